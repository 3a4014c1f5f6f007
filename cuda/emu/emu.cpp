/* emu.cpp - a block of threads as fibers, its barriers, its shared memory and its asynchronous copies.
 *
 * A fiber that waits is off the list of those that can run; when the list is empty and threads are left,
 * they wait for something that cannot come, and the launch fails with the reason.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/simt.h"

#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/emu/emu_fiber.h"
#include "cuda/emu/emu_runtime.h"

emu_thread emu_here;

namespace {

/* Kernels keep up to a few KB of tiles on the stack; ASan's redzones multiply that. */
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t GUARD_BYTES = 64; /* behind each shared array */
constexpr int POISON = 0xff;       /* NaN in f16, bf16, f32 and f64 */

enum wait_kind { RUNS, AT_BARRIER, AT_WARP, GONE };

struct async_copy {
    char *dst;
    const char *src;
    unsigned bytes, valid, group;
};

struct fiber_free {
    void operator()(emu_fiber *f) const { emu_fiber_free(f); }
};

struct thread {
    std::unique_ptr<emu_fiber, fiber_free> fiber;
    dim3 id;
    wait_kind wait = GONE;
    emu_warp_fn meets = nullptr; /* AT_WARP: in which operation */
    int meets_arg = 0;
    std::vector<async_copy> copies;
    unsigned group = 0; /* of cp.async: the open one */
};

struct warp {
    emu_warp data;
    int n_arrived = 0;
};

struct shared_array {
    const void *key;
    char *data;
    size_t bytes;
};

struct grid_state {
    std::vector<thread> threads;
    std::vector<warp> warps;
    std::vector<int> ready; /* threads that can run; with seed 0 a queue from `head` */
    size_t head = 0;
    std::vector<shared_array> shared;
    size_t dynamic_bytes = 0;
    const std::function<void()> *body = nullptr;
    const char *kernel = "";
    int favourite = 0, now = 0, n_live = 0, n_at_barrier = 0, n_thread = 0;
    bool failed = false;
    uint64_t seed = 0, rng = 0;
};

grid_state g;
std::string fault;

uint32_t draw()
{
    g.rng = g.rng * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(g.rng >> 33);
}

void fail(const char *what)
{
    if (fault.empty()) {
        char text[256];
        snprintf(text, sizeof text, "%s: %s (block %u %u %u, thread %u)", g.kernel, what, emu_here.block.x,
                 emu_here.block.y, emu_here.block.z, emu_here.thread.x);
        fault = text;
    }
    g.failed = true;
}

void become(int i)
{
    g.now = i;
    emu_here.thread = g.threads[static_cast<size_t>(i)].id;
    emu_here.lane = i & 31;
}

void make_ready(int i)
{
    g.threads[static_cast<size_t>(i)].wait = RUNS;
    g.ready.push_back(i);
}

/* A place in `ready`. For some time one warp goes first: it gets as far ahead of the others as barriers
 * let it, which even chances never do. */
size_t draw_ready()
{
    size_t n = g.ready.size() - g.head, from = draw() % n;
    if (draw() % 128 == 0) g.favourite = static_cast<int>(draw() % g.warps.size());
    if (draw() % 16)
        for (size_t i = 0; i < n; i++) {
            size_t at = g.head + (from + i) % n;
            if (g.ready[at] / 32 == g.favourite) return at;
        }
    return g.head + from;
}

/* Who runs next, or -1. */
int take_ready()
{
    if (g.head == g.ready.size()) return -1;
    if (g.seed) {
        size_t at = draw_ready();
        std::swap(g.ready[at], g.ready.back());
        int i = g.ready.back();
        g.ready.pop_back();
        return i;
    }
    int i = g.ready[g.head++];
    if (g.head == g.ready.size() || g.head > 8192) {
        g.ready.erase(g.ready.begin(), g.ready.begin() + static_cast<std::ptrdiff_t>(g.head));
        g.head = 0;
    }
    return i;
}

/* The current fiber stops here; it goes on when it is ready and drawn. */
void give_way()
{
    thread *self = &g.threads[static_cast<size_t>(g.now)];
    int next = g.failed ? -1 : take_ready();
    if (next < 0 && !g.failed && g.n_live > 0) fail("threads wait for each other: a barrier or warp operation that not all reach");
    if (next == g.now) return;
    int mine = g.now;
    if (next >= 0) become(next);
    emu_fiber_switch(self->fiber.get(), next >= 0 ? g.threads[static_cast<size_t>(next)].fiber.get() : nullptr);
    become(mine);
}

void sometimes_give_way()
{
    if (!g.seed || draw() % 8) return;
    make_ready(g.now);
    give_way();
}

void release_barrier()
{
    g.n_at_barrier = 0;
    for (int i = 0; i < g.n_thread; i++)
        if (g.threads[static_cast<size_t>(i)].wait == AT_BARRIER) make_ready(i);
}

void thread_main()
{
    (*g.body)();
    thread *t = &g.threads[static_cast<size_t>(g.now)];
    t->wait = GONE;
    g.n_live--;
    if (g.n_live > 0 && g.n_at_barrier == g.n_live) release_barrier();
    give_way();
}

void land(const async_copy &c)
{
    if (c.valid) memcpy(c.dst, c.src, c.valid);
    memset(c.dst + c.valid, 0, c.bytes - c.valid);
}

void check_guards()
{
    for (const shared_array &a : g.shared)
        for (size_t i = 0; i < GUARD_BYTES; i++)
            if (static_cast<unsigned char>(a.data[a.bytes + i]) != POISON) {
                fail("a write past the end of shared memory");
                return;
            }
}

/* Under ASan the guard cannot be touched; it is unpoisoned for the check by being outside the array only. */
char *shared_alloc(size_t bytes)
{
    char *p = static_cast<char *>(malloc(bytes + GUARD_BYTES));
    if (!p) abort();
    memset(p, POISON, bytes + GUARD_BYTES);
    emu_guard(p + bytes, GUARD_BYTES, true);
    return p;
}

void free_shared()
{
    for (const shared_array &a : g.shared) {
        emu_guard(a.data + a.bytes, GUARD_BYTES, false);
        free(a.data);
    }
    g.shared.clear();
}

void run_block(dim3 block)
{
    emu_here.block = block;
    g.ready.clear();
    g.head = 0;
    g.n_live = g.n_thread;
    g.n_at_barrier = 0;
    for (warp &w : g.warps) w.n_arrived = 0;
    for (int i = 0; i < g.n_thread; i++) {
        thread &t = g.threads[static_cast<size_t>(i)];
        t.copies.clear();
        t.group = 0;
        emu_fiber_reset(t.fiber.get(), thread_main);
        make_ready(i);
    }
    int first = take_ready();
    become(first);
    emu_fiber_enter(g.threads[static_cast<size_t>(first)].fiber.get());
    for (const shared_array &a : g.shared) emu_guard(a.data + a.bytes, GUARD_BYTES, false);
    check_guards();
    free_shared();
}

void run_grid(const char *kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body)
{
    unsigned n = block.x * block.y * block.z;
    if (n == 0 || n > 1024 || n % 32 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        g.kernel = kernel;
        fail("a launch with no valid shape (blocks are whole warps, at most 1024 threads)");
        return;
    }
    g.kernel = kernel;
    g.body = &body;
    g.n_thread = static_cast<int>(n);
    g.dynamic_bytes = shared;
    g.rng = g.seed;
    g.favourite = 0;
    g.failed = false;
    emu_here.n_thread = block;
    emu_here.n_block = grid;
    if (g.threads.size() < n) g.threads.resize(n);
    g.warps.resize(n / 32);
    for (unsigned i = 0; i < n; i++) {
        thread &t = g.threads[i];
        if (!t.fiber) t.fiber.reset(emu_fiber_new(STACK_BYTES));
        t.id = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    }
    for (unsigned z = 0; z < grid.z && !g.failed; z++)
        for (unsigned y = 0; y < grid.y && !g.failed; y++)
            for (unsigned x = 0; x < grid.x && !g.failed; x++) run_block(dim3(x, y, z));
}

} // namespace

extern "C" void emu_set_seed(uint64_t seed) { g.seed = seed; }

extern "C" const char *emu_take_fault(void)
{
    static std::string last;
    last = fault;
    fault.clear();
    g.failed = false;
    return last.c_str();
}

bool emu_has_fault() { return !fault.empty(); }

void emu_run(const char *kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body)
{
    run_grid(kernel, grid, block, shared, body);
}

void emu_block_barrier()
{
    sometimes_give_way();
    g.threads[static_cast<size_t>(g.now)].wait = AT_BARRIER;
    if (++g.n_at_barrier == g.n_live) release_barrier();
    give_way();
}

emu_warp *emu_my_warp() { return &g.warps[static_cast<size_t>(g.now / 32)].data; }

void emu_meet(emu_warp_fn fn, int arg)
{
    warp *w = &g.warps[static_cast<size_t>(g.now / 32)];
    thread *self = &g.threads[static_cast<size_t>(g.now)];
    self->meets = fn;
    self->meets_arg = arg;
    int first = g.now / 32 * 32;
    if (++w->n_arrived < 32) {
        self->wait = AT_WARP;
        give_way();
        return;
    }
    w->n_arrived = 0;
    for (int i = first; i < first + 32; i++) {
        const thread &t = g.threads[static_cast<size_t>(i)];
        if (t.meets != fn || t.meets_arg != arg) {
            fail("lanes of a warp meet in different operations");
            give_way();
            return;
        }
    }
    if (fn) fn(&w->data, arg);
    for (int i = first; i < first + 32; i++)
        if (i != g.now) make_ready(i);
    sometimes_give_way();
}

void *emu_shared(const void *key, size_t bytes)
{
    for (const shared_array &a : g.shared)
        if (a.key == key) return a.data;
    g.shared.push_back({ key, shared_alloc(bytes), bytes });
    return g.shared.back().data;
}

void *emu_shared_dynamic()
{
    static const char key = 0;
    return emu_shared(&key, g.dynamic_bytes);
}

void emu_cp_async(void *dst, const void *src, unsigned bytes, unsigned valid)
{
    thread *t = &g.threads[static_cast<size_t>(g.now)];
    if (reinterpret_cast<uintptr_t>(dst) % bytes || (valid && reinterpret_cast<uintptr_t>(src) % bytes))
        fail("cp.async of an address that is not a multiple of its size");
    async_copy c = { static_cast<char *>(dst), static_cast<const char *>(src), bytes, valid, t->group };
    if (g.seed && draw() % 2)
        land(c); /* a copy may come at once: what it overwrites must have been read */
    else
        t->copies.push_back(c);
}

void emu_check_align(const void *p, unsigned bytes)
{
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a load or store of an address that is not a multiple of its size");
}

void emu_cp_commit() { g.threads[static_cast<size_t>(g.now)].group++; }

/* All groups but the last `pending` committed ones are complete. */
void emu_cp_wait(unsigned pending)
{
    thread *t = &g.threads[static_cast<size_t>(g.now)];
    size_t kept = 0;
    for (size_t i = 0; i < t->copies.size(); i++) {
        const async_copy &c = t->copies[i];
        if (c.group + pending < t->group) {
            land(c);
        } else {
            t->copies[kept++] = c;
        }
    }
    t->copies.resize(kept);
}
