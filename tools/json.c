/* json.c - see json.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "json.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "utf8.h"

static void add(cJSON *object, const char *name, cJSON *item)
{
    if (!item) return;
    cJSON_bool ok = !object ? 0
                    : name  ? cJSON_AddItemToObject(object, name, item)
                            : cJSON_AddItemToArray(object, item);
    if (!ok) cJSON_Delete(item);
}

void json_text(cJSON *object, const char *name, const char *text, size_t n)
{
    buffer clean = { 0 };
    if (n == (size_t)-1) n = strlen(text);
    /* cJSON ends a string at the first NUL; none may be inside. */
    utf8_add_clean(&clean, text, n, UTF8_KEEP);
    for (size_t i = 0; i < clean.n; i++)
        if (!clean.v[i]) clean.v[i] = ' ';
    add(object, name, cJSON_CreateString(buffer_text(&clean)));
    buffer_free(&clean);
}

void json_int(cJSON *object, const char *name, int64_t value)
{
    add(object, name, cJSON_CreateNumber((double)value));
}

void json_real(cJSON *object, const char *name, double value)
{
    add(object, name, isfinite(value) ? cJSON_CreateNumber(value) : cJSON_CreateNull());
}

void json_bool(cJSON *object, const char *name, bool value) { add(object, name, cJSON_CreateBool(value)); }

static cJSON *attach(cJSON *object, const char *name, cJSON *item)
{
    if (!object || !item) {
        cJSON_Delete(item);
        return NULL;
    }
    add(object, name, item);
    return item;
}

cJSON *json_object(cJSON *object, const char *name) { return attach(object, name, cJSON_CreateObject()); }
cJSON *json_array(cJSON *object, const char *name) { return attach(object, name, cJSON_CreateArray()); }

bool json_print(cJSON *value)
{
    char *text = value ? cJSON_PrintUnformatted(value) : NULL;
    cJSON_Delete(value);
    if (!text) return false;
    puts(text);
    fflush(stdout);
    cJSON_free(text);
    return true;
}
