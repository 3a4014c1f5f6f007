/* emu_fiber.cpp - see emu_fiber.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/emu/emu_fiber.h"

#include <stdint.h>
#include <stdlib.h>

#if !defined(__x86_64__) || defined(KVF_EMU_UCONTEXT)
#define EMU_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif

#ifdef EMU_ASAN
extern "C" void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom_old, size_t *size_old);
#endif

struct emu_fiber {
    char *stack;
    size_t bytes;
    void (*entry)();
    void *fake; /* ASan's */
#ifdef EMU_UCONTEXT
    ucontext_t context;
#else
    void *sp;
#endif
};

static emu_fiber owner; /* the thread that runs the blocks */
#ifdef EMU_ASAN
static const void *owner_stack;
static size_t owner_bytes;
#endif

#ifndef EMU_UCONTEXT
/* Callee-saved registers of the System V ABI go on the old stack, those of the new come back. */
extern "C" void emu_switch_stack(void **save, void *to);
asm(".text\n"
    ".globl emu_switch_stack\n"
    ".hidden emu_switch_stack\n"
    ".type emu_switch_stack,@function\n"
    "emu_switch_stack:\n"
    "    push %rbp\n    push %rbx\n    push %r12\n    push %r13\n    push %r14\n    push %r15\n"
    "    mov %rsp, (%rdi)\n"
    "    mov %rsi, %rsp\n"
    "    pop %r15\n    pop %r14\n    pop %r13\n    pop %r12\n    pop %rbx\n    pop %rbp\n"
    "    ret\n"
    ".size emu_switch_stack,.-emu_switch_stack\n");
#endif

static emu_fiber *current;

/* Runs on the new stack before anything else does. */
static void arrived(void)
{
#ifdef EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(current->fake, &bottom, &bytes);
    if (!owner_stack) {
        owner_stack = bottom;
        owner_bytes = bytes;
    }
#endif
}

static void first_turn(void)
{
    arrived();
    current->entry();
    abort(); /* an entry does not return */
}

static void go(emu_fiber *from, emu_fiber *to)
{
#ifdef EMU_ASAN
    const void *bottom = to == &owner ? owner_stack : to->stack;
    __sanitizer_start_switch_fiber(&from->fake, bottom, to == &owner ? owner_bytes : to->bytes);
#endif
    current = to;
#ifdef EMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    emu_switch_stack(&from->sp, to->sp);
#endif
    arrived();
}

emu_fiber *emu_fiber_new(size_t stack_bytes)
{
    emu_fiber *f = static_cast<emu_fiber *>(calloc(1, sizeof *f));
    if (!f) abort();
    f->bytes = stack_bytes;
    f->stack = static_cast<char *>(aligned_alloc(64, stack_bytes));
    if (!f->stack) abort();
    return f;
}

void emu_fiber_free(emu_fiber *f)
{
    if (!f) return;
    free(f->stack);
    free(f);
}

void emu_fiber_reset(emu_fiber *f, void (*entry)())
{
    f->entry = entry;
    f->fake = nullptr;
#ifdef EMU_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = f->bytes;
    f->context.uc_link = nullptr;
    makecontext(&f->context, first_turn, 0);
#else
    /* As after a call: rsp is 8 off a multiple of 16 when first_turn begins. */
    uintptr_t top = (reinterpret_cast<uintptr_t>(f->stack) + f->bytes) & ~static_cast<uintptr_t>(15);
    void **sp = reinterpret_cast<void **>(top - 16);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void *>(first_turn);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f->sp = sp;
#endif
}

void emu_fiber_enter(emu_fiber *to)
{
#ifdef EMU_ASAN
    owner_stack = nullptr;
#endif
    go(&owner, to);
}

void emu_fiber_switch(emu_fiber *from, emu_fiber *to) { go(from, to ? to : &owner); }
