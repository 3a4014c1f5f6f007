/* fuzz_kv.c - any bytes as operations on sequences of the KV manager: tests/kv_ops.c, whose models decide.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kv_ops.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kv_ops_report report = { 0 };
    uint8_t ops[1 + 3 * 60];
    if (size < 1) return 0;
    if (size > sizeof ops) size = sizeof ops; /* longer ones only take longer, and so does the last shape */
    memcpy(ops, data, size);
    ops[0] = data[0] % (KV_OPS_SHAPES - 1);
    if (kv_ops_run(ops, size, &report)) return 0;
    fprintf(stderr, "%s\n", report.why);
    abort();
}
