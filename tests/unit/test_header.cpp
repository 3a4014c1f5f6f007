/* test_header.cpp - kvfold.h compiles alone, first, as C++17, and links as C.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <kvfold/kvfold.h>
#include <kvfold/merge.h>
#include <kvfold/vision.h>

#include <criterion/criterion.h>

#include <memory>
#include <type_traits>

static_assert(std::is_standard_layout<kvf_session_params>::value, "params are plain C structs");
static_assert(std::is_trivially_copyable<kvf_stats>::value, "stats are plain C structs");

struct close_ctx {
    void operator()(kvf_ctx *ctx) const { kvf_ctx_close(ctx); }
};

Test(header_cpp, handles_live_in_smart_pointers)
{
    kvf_ctx_params params;
    kvf_ctx_params_init(&params);
    params.n_threads = 2;
    kvf_ctx *raw = nullptr;
    kvf_error err;
    cr_assert(kvf_ctx_open(&raw, &params, &err) == KVF_OK);
    std::unique_ptr<kvf_ctx, close_ctx> ctx(raw);
    cr_assert(kvf_ctx_threads(ctx.get()) == 2);
}
