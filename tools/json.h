/* json.h - results for scripts, through cJSON.
 *
 * Rule: what is printed is valid UTF-8 JSON on one line, whatever the model said.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_JSON_H
#define KVFOLD_TOOLS_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cJSON.h>

/* Add a member; `object` may be an array when name is NULL. NULL objects are ignored, so that one
 * check at the end (json_print) finds a failed allocation. */
void json_text(cJSON *object, const char *name, const char *text, size_t n); /* n (size_t)-1: up to NUL */
void json_int(cJSON *object, const char *name, int64_t value);
void json_real(cJSON *object, const char *name, double value); /* not finite: null */
void json_bool(cJSON *object, const char *name, bool value);
cJSON *json_object(cJSON *object, const char *name);
cJSON *json_array(cJSON *object, const char *name);

/* Print on one line to stdout, flush and free. False if memory ran out. */
bool json_print(cJSON *value);

#endif
