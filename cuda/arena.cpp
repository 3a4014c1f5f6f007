/* arena.cpp - see arena.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/arena.h"

#include <algorithm>
#include <new>

static const size_t UNIT = 256;

void kvf_cuda_arena::reset(size_t bytes)
{
    pieces_.clear();
    used_ = 0;
    total_ = bytes / UNIT * UNIT;
    if (total_ > 0) pieces_.push_back({ 0, total_, false });
}

bool kvf_cuda_arena::take(size_t bytes, size_t *offset)
{
    if (bytes > total_) return false;
    size_t want = bytes ? (bytes + UNIT - 1) / UNIT * UNIT : UNIT;
    for (size_t i = 0; i < pieces_.size(); i++) {
        if (pieces_[i].taken || pieces_[i].bytes < want) continue;
        size_t rest = pieces_[i].bytes - want, at = pieces_[i].offset;
        if (rest > 0) {
            try {
                pieces_.insert(pieces_.begin() + static_cast<std::ptrdiff_t>(i) + 1, { at + want, rest, false });
            } catch (const std::bad_alloc &) {
                return false;
            }
        }
        pieces_[i].bytes = want;
        pieces_[i].taken = true;
        used_ += want;
        *offset = at;
        return true;
    }
    return false;
}

size_t kvf_cuda_arena::give(size_t offset)
{
    auto it = std::lower_bound(pieces_.begin(), pieces_.end(), offset, [](const piece &p, size_t at) { return p.offset < at; });
    if (it == pieces_.end() || it->offset != offset || !it->taken) return 0;
    size_t bytes = it->bytes;
    it->taken = false;
    used_ -= bytes;
    auto next = it + 1;
    if (next != pieces_.end() && !next->taken) {
        it->bytes += next->bytes;
        it = pieces_.erase(next) - 1;
    }
    if (it != pieces_.begin() && !(it - 1)->taken) {
        (it - 1)->bytes += it->bytes;
        pieces_.erase(it);
    }
    return bytes;
}

size_t kvf_cuda_arena::largest_free() const
{
    size_t most = 0;
    for (const piece &p : pieces_)
        if (!p.taken && p.bytes > most) most = p.bytes;
    return most;
}
