/* 06_dlopen.c - use the library without linking it: load it when it is there.
 *
 * For programs that offer kvfold as an option, and for bindings of other languages, which work
 * this way. A pinned ABI makes it safe: check the version first, then look names up.
 *
 *     06_dlopen MODEL.gguf [libkvfold.so.0]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <kvfold/kvfold.h>

/* The functions this program needs, as pointers of the types that the header declares. */
static struct {
    int (*version)(void);
    kvf_status (*ctx_open)(kvf_ctx **, const kvf_ctx_params *, kvf_error *);
    void (*ctx_close)(kvf_ctx *);
    const char *(*ctx_cpu)(const kvf_ctx *);
    kvf_status (*model_open)(kvf_model **, kvf_ctx *, const char *, kvf_error *);
    void (*model_close)(kvf_model *);
    kvf_status (*model_get_info)(const kvf_model *, kvf_model_info *, kvf_error *);
} kvf;

/* dlsym returns void *, which C does not convert to a function pointer: copy the bits, as POSIX
 * says. */
static int look_up(void *library, const char *name, void *pointer)
{
    void *symbol = dlsym(library, name);
    if (!symbol) {
        fprintf(stderr, "the library has no %s\n", name);
        return 0;
    }
    memcpy(pointer, &symbol, sizeof symbol);
    return 1;
}

static int load(const char *name)
{
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 0;
    }
    if (!look_up(library, "kvf_version", &kvf.version)) return 0;
    if (kvf.version() / 100 != KVF_VERSION_NUMBER / 100) {
        fprintf(stderr, "the library is version %d, this program was built for %d\n", kvf.version(),
                KVF_VERSION_NUMBER);
        return 0;
    }
    return look_up(library, "kvf_ctx_open", &kvf.ctx_open) &&
           look_up(library, "kvf_ctx_close", &kvf.ctx_close) &&
           look_up(library, "kvf_ctx_cpu", &kvf.ctx_cpu) &&
           look_up(library, "kvf_model_open", &kvf.model_open) &&
           look_up(library, "kvf_model_close", &kvf.model_close) &&
           look_up(library, "kvf_model_get_info", &kvf.model_get_info);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL.gguf [libkvfold.so.0]\n", argv[0]);
        return 2;
    }
    if (!load(argc > 2 ? argv[2] : "libkvfold.so.0")) return 1;
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_model_info info = { .size = sizeof info };
    kvf_status rc = kvf.ctx_open(&ctx, NULL, &err);
    if (rc == KVF_OK) rc = kvf.model_open(&model, ctx, argv[1], &err);
    if (rc == KVF_OK) rc = kvf.model_get_info(model, &info, &err);
    if (rc == KVF_OK)
        printf("%s, %.1f M parameters in %s, %d layers, on %s\n", info.arch, (double)info.n_params / 1e6,
               info.quantization, (int)info.n_layer, kvf.ctx_cpu(ctx));
    else
        fprintf(stderr, "%s\n", err.msg);
    kvf.model_close(model);
    kvf.ctx_close(ctx);
    return rc == KVF_OK ? 0 : 1;
}
