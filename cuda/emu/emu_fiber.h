/* emu_fiber.h - stacks that are switched by hand, for the threads of an emulated block.
 *
 * On x86-64 a switch is six pushes and six pops; elsewhere, or with KVF_EMU_UCONTEXT, ucontext. ASan is
 * told of every switch, so that its shadow of the stack stays right.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_EMU_EMU_FIBER_H
#define KVF_CUDA_EMU_EMU_FIBER_H

#include <stddef.h>

struct emu_fiber; /* one stack */

/* `entry` runs on the fiber at its first turn and must not return: it ends in emu_fiber_leave. */
emu_fiber *emu_fiber_new(size_t stack_bytes);
void emu_fiber_free(emu_fiber *f);
void emu_fiber_reset(emu_fiber *f, void (*entry)());

/* From the thread that owns the stacks to a fiber, and from a fiber to another or (NULL) back. */
void emu_fiber_enter(emu_fiber *to);
void emu_fiber_switch(emu_fiber *from, emu_fiber *to);

#endif
