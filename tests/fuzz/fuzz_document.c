/* fuzz_document.c - the document readers on any bytes.
 *
 * The first byte chooses the file name, thus the reader. PDF is left to poppler's own fuzzing
 * unless the environment says KVFOLD_FUZZ_PDF=1: its findings are not ours to fix.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>

#include "doc.h"
#include "utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = { "a.txt", "a.html", "a.md", "a.html.gz", "-", "a.pdf" };
    if (size < 1) return 0;
    unsigned n_names = getenv("KVFOLD_FUZZ_PDF") ? 6 : 5;
    const char *name = names[data[0] % n_names];
    data++;
    size--;
    if (n_names == 5 && size >= 5 && data[0] == '%' && data[1] == 'P') return 0;
    document d;
    kvf_error err = { 0 };
    if (doc_from_bytes(&d, name, data, size, 1 << 20, &err) != KVF_OK) {
        if (err.code >= 0 || !err.msg[0] || d.text.v) abort(); /* an error has a code and a sentence */
        return 0;
    }
    size_t n_multi, n_bad;
    utf8_survey(d.text.v, d.text.n, &n_multi, &n_bad);
    if (!d.text.n || n_bad) abort(); /* a text is not empty and is UTF-8 */
    doc_close(&d);
    return 0;
}
