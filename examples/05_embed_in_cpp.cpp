/* 05_embed_in_cpp.cpp - kvfold in a C++ program: handles own themselves, failures are exceptions.
 *
 * The header is C and stays C; these thirty lines are all the wrapping that C++17 needs.
 *
 *     05_embed_in_cpp MODEL.gguf ["prompt"]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <kvfold/kvfold.h>

namespace {

struct closer {
    void operator()(kvf_ctx *p) const { kvf_ctx_close(p); }
    void operator()(kvf_model *p) const { kvf_model_close(p); }
    void operator()(kvf_session *p) const { kvf_session_close(p); }
};
template <class T> using handle = std::unique_ptr<T, closer>;

/* Call an open function: the out-handle comes first, the error last, in every one of them. */
template <class T, class Open, class... Args> handle<T> open(Open function, Args... args)
{
    T *raw = nullptr;
    kvf_error err;
    if (function(&raw, args..., &err) < 0) throw std::runtime_error(err.msg);
    return handle<T>(raw);
}

/* The same for calls that only do something. Returns KVF_OK or KVF_DONE. */
template <class Function, class... Args> kvf_status call(Function function, Args... args)
{
    kvf_error err;
    kvf_status rc = function(args..., &err);
    if (rc < 0) throw std::runtime_error(err.msg);
    return rc;
}

class writer {
public:
    explicit writer(const std::string &path)
        : ctx_(open<kvf_ctx>(kvf_ctx_open, nullptr)),
          model_(open<kvf_model>(kvf_model_open, ctx_.get(), path.c_str())),
          session_(open<kvf_session>(kvf_session_open, model_.get(), nullptr))
    {
    }

    std::string continue_text(std::string_view prompt, int n_max)
    {
        std::vector<kvf_token> tokens(prompt.size() + 8);
        kvf_token_buf buf{ tokens.data(), int64_t(tokens.size()), 0 };
        call(kvf_tokenize, model_.get(), prompt.data(), prompt.size(), int(KVF_TOKENIZE_BOS), &buf);
        call(kvf_session_sync, session_.get(), buf.v, buf.n);
        std::string text;
        kvf_token token;
        while (n_max-- > 0 && call(kvf_session_next, session_.get(), &token) == KVF_OK) {
            const char *bytes;
            size_t size;
            if (kvf_token_bytes(model_.get(), token, &bytes, &size) == KVF_OK) text.append(bytes, size);
        }
        return text;
    }

private:
    /* Members are destroyed in reverse order: session, model, ctx, as their lifetimes nest. */
    handle<kvf_ctx> ctx_;
    handle<kvf_model> model_;
    handle<kvf_session> session_;
};

} // namespace

int main(int argc, char **argv)
{
    if (argc < 2) {
        std::cerr << "usage: " << argv[0] << " MODEL.gguf [\"prompt\"]\n";
        return 2;
    }
    try {
        writer w(argv[1]);
        std::string_view prompt = argc > 2 ? argv[2] : "def fibonacci(n):";
        std::cout << prompt << w.continue_text(prompt, 48) << "\n";
        return 0;
    } catch (const std::exception &failure) {
        std::cerr << failure.what() << "\n";
        return 1;
    }
}
