/* arena.h - pieces of one block of memory: first fit, neighbours that are free become one.
 *
 * It hands out offsets and never touches the memory, which may be a device's. Sizes are rounded up to 256
 * bytes, the alignment that every kernel can count on. A few hundred pieces are usual (weights, slabs of
 * slots, scratch), so a list in order of address is searched from its start.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_ARENA_H
#define KVF_CUDA_ARENA_H

#include <stddef.h>

#include <vector>

class kvf_cuda_arena {
public:
    explicit kvf_cuda_arena(size_t bytes = 0) { reset(bytes); }
    void reset(size_t bytes);
    /* False: no free piece is large enough, or the host has no memory for the list. */
    bool take(size_t bytes, size_t *offset);
    /* Returns the piece's size; 0: there is no such piece. */
    size_t give(size_t offset);
    size_t used() const { return used_; }
    size_t total() const { return total_; }
    size_t largest_free() const;

private:
    struct piece {
        size_t offset, bytes;
        bool taken;
    };
    std::vector<piece> pieces_; /* by offset, without gaps */
    size_t used_ = 0, total_ = 0;
};

#endif
