/* frame_choice.c - see frame_choice.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "frame_choice.h"

#include <math.h>

#include "report.h"

/* Times come from rational numbers turned into double: one is not later than another by less than this. */
#define SAME_TIME 1e-6

static kvf_status evenly(int64_t first, int64_t count, int64_t frames, int64_t *out, int64_t *n_out)
{
    int64_t n = frames < count ? frames : count;
    /* i * (count - 1) stays below 2^63: i is at most FRAME_CHOICE_MAX, count a number of packets. */
    for (int64_t i = 0; i < n; i++) out[i] = first + (n > 1 ? i * (count - 1) / (n - 1) : 0);
    *n_out = n;
    return KVF_OK;
}

/* Frame i is on the screen from its time to the next one's, the last one for a mean frame. It is chosen if a
 * tick k / fps falls into that. Ticks stay in double: times of a damaged clip may be astronomical. */
static kvf_status at_rate(const double *time, int64_t first, int64_t count, const frame_request *q,
                          int64_t cap, int64_t *out, int64_t *n_out)
{
    const double *t = time + first;
    double mean = count > 1 ? (t[count - 1] - t[0]) / (double)(count - 1) : 1 / q->fps;
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) {
        double from = (t[i] - q->start) * q->fps;
        double to = ((i + 1 < count ? t[i + 1] : t[i] + mean) - q->start) * q->fps;
        double tick = i ? ceil(from - SAME_TIME) : 0;
        if (i && tick >= to - SAME_TIME) continue;
        if (n == cap) return KVF_ERR_LIMIT;
        out[n++] = first + i;
    }
    *n_out = n;
    return KVF_OK;
}

kvf_status frame_choose(const double *time, int64_t n, const frame_request *q, int64_t *out, int64_t cap,
                        int64_t *n_out, kvf_error *err)
{
    *n_out = 0;
    double length = n > 0 ? time[n - 1] : 0;
    if (!(q->start >= 0) || !(q->end >= 0) || (q->end > 0 && q->end <= q->start))
        return report_fail(err, KVF_ERR_ARG,
                           "--start %g and --end %g are no part of a clip; end comes after start.", q->start,
                           q->end);
    if (q->frames < 1 && !(q->fps > 0)) return report_fail(err, KVF_ERR_ARG, "Ask for at least one frame.");
    int64_t first = 0;
    while (first < n && time[first] < q->start - SAME_TIME) first++;
    int64_t stop = first;
    while (stop < n && (q->end <= 0 || time[stop] < q->end - SAME_TIME)) stop++;
    if (stop == first && q->end > 0)
        return report_fail(err, KVF_ERR_ARG,
                           "No frame lies between second %g and %g; the clip's last one is at second %.2f.",
                           q->start, q->end, length);
    if (stop == first)
        return report_fail(err, KVF_ERR_ARG,
                           "No frame lies at or after second %g; the clip's last one is at second %.2f.",
                           q->start, length);
    kvf_status rc;
    if (q->frames > 0 && (q->frames < stop - first ? q->frames : stop - first) > cap)
        rc = KVF_ERR_LIMIT;
    else if (q->frames > 0)
        rc = evenly(first, stop - first, q->frames, out, n_out);
    else
        rc = at_rate(time, first, stop - first, q, cap, out, n_out);
    if (rc == KVF_ERR_LIMIT)
        return report_fail(err, rc,
                           "More than %lld frames would be looked at; ask for fewer with --frames or --fps.",
                           (long long)cap);
    return rc;
}
