/* video_report.c - see video_report.h.
 *
 * A frame's tokens are three SVG paths over its picture, one per fate, each a run of squares per row: a
 * page of 600 frames stays a few megabytes.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_report.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt.h"
#include "outfile.h"
#include "report.h"
#include "video_style.h"

/* Frames of one segment that are shown at most: of a long one the rest looks the same. */
#define SEGMENT_FRAMES 18

/* What became of a token of the input. */
typedef enum fate { DROPPED, MERGED, CENTRE, COPIED, N_FATES } fate;

static const char *const fate_class[N_FATES] = { "d", "m", "c", "k" };

typedef struct page {
    const video_page *in;
    buffer out;
    unsigned char *fates; /* [n_frame * n_tok] */
    int64_t (*count)[2];  /* [n_frame] output tokens: copied, merged */
    int64_t *used;        /* [n_segment] output tokens */
    int64_t grid_w, grid_h;
} page;

static void add_escaped(buffer *b, const char *text)
{
    for (; *text; text++) switch (*text) {
        case '<': buffer_add_text(b, "&lt;"); break;
        case '>': buffer_add_text(b, "&gt;"); break;
        case '&': buffer_add_text(b, "&amp;"); break;
        case '"': buffer_add_text(b, "&quot;"); break;
        default:
            if ((unsigned char)*text >= 0x20) buffer_add_char(b, *text);
        }
}

static void add_base64(buffer *b, const unsigned char *v, size_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t x =
            (uint32_t)v[i] << 16 | (i + 1 < n ? (uint32_t)v[i + 1] << 8 : 0) | (i + 2 < n ? v[i + 2] : 0);
        char four[4] = { digits[x >> 18], digits[x >> 12 & 63], digits[x >> 6 & 63], digits[x & 63] };
        if (i + 1 >= n) four[2] = '=';
        if (i + 2 >= n) four[3] = '=';
        buffer_add(b, four, sizeof four);
    }
}

/* "0:04.2", "1:02:03.4" */
static const char *clock_text(char out[32], double seconds)
{
    int64_t tenths = seconds > 0 && seconds < 1e9 ? (int64_t)(seconds * 10 + 0.5) : 0, s = tenths / 10;
    if (s >= 3600)
        snprintf(out, 32, "%" PRId64 ":%02d:%02d.%d", s / 3600, (int)(s / 60 % 60), (int)(s % 60),
                 (int)(tenths % 10));
    else
        snprintf(out, 32, "%d:%02d.%d", (int)(s / 60), (int)(s % 60), (int)(tenths % 10));
    return out;
}

/* ---- Counting ----------------------------------------------------------------------------- */

static void count(page *p)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    int64_t n = plan->n_frame * plan->n_tok;
    for (int64_t i = 0; i < n; i++) p->fates[i] = p->in->owner[i] < 0 ? DROPPED : MERGED;
    for (int64_t i = 0; i < plan->n_out; i++) {
        const kvf_merge_meta *m = &plan->meta[i];
        if (m->kind == KVF_MERGE_NEWLINE) continue;
        bool copied = m->kind == KVF_MERGE_COPIED;
        p->fates[(int64_t)m->frame * plan->n_tok + m->position] = copied ? COPIED : CENTRE;
        p->count[m->frame][!copied]++;
        p->used[m->segment]++;
    }
}

/* ---- Parts of the page ---------------------------------------------------------------------- */

static void add_figure(buffer *b, const char *value, const char *label)
{
    buffer_add_text(b, "<div class=n><b>");
    add_escaped(b, value);
    buffer_add_text(b, "</b><span>");
    add_escaped(b, label);
    buffer_add_text(b, "</span></div>\n");
}

static void add_summary(page *p)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    buffer *b = &p->out;
    char a[32], text[96];
    int64_t n_in = plan->n_frame * plan->n_tok;
    buffer_add_text(b, "<div class=figures>\n");
    add_figure(b, report_count(a, n_in), "tokens in");
    add_figure(b, report_count(a, plan->n_out), "tokens out");
    snprintf(text, sizeof text, "%.1f %%", 100 * (double)plan->n_out / (double)n_in);
    add_figure(b, text, "kept");
    add_figure(b, report_count(a, plan->n_frame), "frames");
    add_figure(b, report_count(a, plan->n_segment), plan->n_segment == 1 ? "segment" : "segments");
    add_figure(b, report_count(a, plan->n_copied), "tokens copied");
    add_figure(b, report_count(a, plan->n_merged), "tokens merged");
    if (p->in->quality) {
        snprintf(text, sizeof text, "%.3f", p->in->quality->nearest_mean);
        add_figure(b, text, "mean distance to the nearest token kept (1 - cosine)");
    }
    buffer_add_text(b, "</div>\n");
}

static void add_row(buffer *b, const char *name, const char *value)
{
    buffer_add_text(b, "<tr><th>");
    add_escaped(b, name);
    buffer_add_text(b, "<td>");
    add_escaped(b, value);
    buffer_add_text(b, "\n");
}

static void add_details(page *p)
{
    const video_page *in = p->in;
    const video_tokens *t = in->tokens;
    buffer *b = &p->out;
    char text[1280], length[32];
    buffer_add_text(b, "<details><summary>How it was made</summary><table class=facts>\n");
    if (t->is_clip) {
        snprintf(text, sizeof text, "%d x %d, %.3g frames a second, %s (%s in %s)", t->clip.width,
                 t->clip.height, t->clip.fps, clock_text(length, t->clip.seconds), t->clip.codec,
                 t->clip.container);
        add_row(b, "clip", text);
    }
    add_row(b, "features", t->from);
    snprintf(text, sizeof text,
             "%" PRId64 " frames x %" PRId64 " tokens (%" PRId64 " x %" PRId64 ") x %" PRId64 " numbers",
             t->n_frame, t->n_tok, p->grid_w, p->grid_h, t->dim);
    add_row(b, "shape", text);
    add_row(b, "planner", in->plan->spec);
    add_row(b, "scores", in->plan->scores);
    snprintf(text, sizeof text, "decoding %.2f s, features %.2f s, planning %.1f ms (similarity %.1f ms, %s)",
             t->decode_s, t->encode_s, in->plan->plan_ms, in->plan->similarity_ms, in->plan->cpu);
    add_row(b, "time", text);
    buffer_add_text(b, "</table></details>\n");
}

/* Round steps for an axis: 1, 2, 5, 10, ... so that there are at most `most`. */
static int64_t axis_step(int64_t top, int64_t most)
{
    int64_t step = 1;
    for (int i = 0; top / step > most && step < INT64_MAX / 10; i++)
        step = step / (i % 3 == 1 ? 2 : 1) * (i % 3 == 1 ? 5 : 2);
    return step;
}

#define CHART_W 1000.0
#define CHART_H 150.0

static void add_axis(page *p, int64_t top, double x_scale)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    buffer *b = &p->out;
    int64_t step = axis_step(top, 4);
    for (int64_t v = 0; v <= top; v += step) {
        double y = CHART_H - CHART_H * (double)v / (double)top;
        buffer_printf(
            b, "<path class=grid d=\"M0 %.1fH%.0f\"/><text x=-6 y=%.1f text-anchor=end>%" PRId64 "</text>\n",
            y, CHART_W, y + 4, v);
    }
    step = axis_step(plan->n_frame, 16);
    for (int64_t f = 0; f < plan->n_frame; f += step) {
        char at[32];
        double x = ((double)f + 0.5) * x_scale;
        if (p->in->tokens->time)
            clock_text(at, p->in->tokens->time[f]);
        else
            snprintf(at, sizeof at, "%" PRId64, f);
        buffer_printf(b, "<text x=%.1f y=%.0f text-anchor=middle>%s</text>\n", x, CHART_H + 26, at);
    }
}

static void add_bars(page *p, int64_t top, double x_scale)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    double bar = x_scale > 4 ? x_scale - (x_scale > 12 ? 4 : 1) : x_scale;
    for (int64_t f = 0; f < plan->n_frame; f++) {
        double y = CHART_H, x = (double)f * x_scale + (x_scale - bar) / 2;
        for (int kind = 0; kind < 2; kind++) {
            double h = CHART_H * (double)p->count[f][kind] / (double)top;
            if (!(h > 0)) continue;
            y -= h;
            buffer_printf(&p->out,
                          "<rect class=%s x=%.2f y=%.2f width=%.2f height=%.2f><title>frame %" PRId64
                          ": %" PRId64 " copied, %" PRId64 " merged</title></rect>\n",
                          kind ? "bm" : "bk", x, y, bar, h, f, p->count[f][0], p->count[f][1]);
        }
    }
}

static void add_chart(page *p)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    buffer *b = &p->out;
    int64_t top = 1;
    for (int64_t f = 0; f < plan->n_frame; f++)
        if (p->count[f][0] + p->count[f][1] > top) top = p->count[f][0] + p->count[f][1];
    double x_scale = CHART_W / (double)plan->n_frame;
    buffer_add_text(
        b, "<h2>Tokens per frame</h2>\n<p class=key><i class=bk></i>copied as they are <i "
           "class=bm></i>merged over "
           "the segment, counted in its first frame; the band below the bars shows the segments</p>\n");
    buffer_printf(b,
                  "<svg class=chart viewBox=\"-44 -8 %.0f %.0f\" role=img aria-label=\"tokens per frame\">\n",
                  CHART_W + 52, CHART_H + 44);
    add_axis(p, top, x_scale);
    add_bars(p, top, x_scale);
    for (int64_t s = 0; s < plan->n_segment; s++)
        buffer_printf(b,
                      "<rect class=s%d x=%.2f y=%.0f width=%.2f height=6><title>segment %" PRId64
                      "</title></rect>\n",
                      (int)(s % 2), (double)plan->segment[s].first * x_scale, CHART_H + 3,
                      (double)(plan->segment[s].last - plan->segment[s].first + 1) * x_scale, s + 1);
    buffer_add_text(b, "</svg>\n");
}

/* All tokens of one fate in a frame as a path in units of tokens, runs along rows. */
static void add_fate(page *p, const unsigned char *fates, fate which)
{
    buffer *b = &p->out;
    bool open = false;
    for (int64_t y = 0; y < p->grid_h; y++)
        for (int64_t x = 0; x < p->grid_w; x++) {
            int64_t run = 0;
            /* Centres and copies are drawn one by one: each is an output token. */
            while (x + run < p->grid_w && fates[y * p->grid_w + x + run] == which &&
                   (run == 0 || which <= MERGED))
                run++;
            if (!run) continue;
            if (!open) buffer_printf(b, "<path class=%s d=\"", fate_class[which]);
            buffer_printf(b, "M%" PRId64 " %" PRId64 "h%" PRId64 "v1h-%" PRId64 "z", x, y, run, run);
            open = true;
            x += run - 1;
        }
    if (open) buffer_add_text(b, "\"/>");
}

static void add_frame(page *p, int64_t f)
{
    const video_tokens *t = p->in->tokens;
    buffer *b = &p->out;
    const double *s = t->shown;
    char at[32];
    const buffer *jpeg = t->thumbnail && t->thumbnail[f].n ? &t->thumbnail[f] : NULL;
    double ratio = t->is_clip && t->clip.height > 0 ? (double)t->clip.width / t->clip.height
                                                    : (double)p->grid_w / (double)p->grid_h;
    buffer_printf(b, "<figure><div style=\"aspect-ratio:%.4f\">", ratio);
    if (jpeg) {
        buffer_add_text(b, "<img alt=\"\" src=\"data:image/jpeg;base64,");
        add_base64(b, (const unsigned char *)jpeg->v, jpeg->n);
        buffer_add_text(b, "\">");
    }
    buffer_printf(b,
                  "<svg viewBox=\"0 0 %" PRId64 " %" PRId64
                  "\" preserveAspectRatio=none style=\"left:%.2f%%;top:%.2f%%;width:%.2f%%;"
                  "height:%.2f%%\">",
                  p->grid_w, p->grid_h, 100 * s[0], 100 * s[1], 100 * s[2], 100 * s[3]);
    for (int which = 0; which < N_FATES; which++) add_fate(p, p->fates + f * t->n_tok, (fate)which);
    buffer_printf(b, "</svg></div><figcaption>%" PRId64, f);
    if (t->time) buffer_printf(b, " &middot; %s", clock_text(at, t->time[f]));
    buffer_printf(b, "<em>%" PRId64 "</em></figcaption></figure>\n", p->count[f][0] + p->count[f][1]);
}

/* Frames of a segment that are shown: its first and last, others spread between. */
static int64_t shown_of(const kvf_merge_plan_info *plan, int64_t s)
{
    int64_t n = plan->segment[s].last - plan->segment[s].first + 1;
    int64_t share = VIDEO_PAGE_FRAMES / plan->n_segment, most = share < 2                ? 2
                                                                : share < SEGMENT_FRAMES ? share
                                                                                         : SEGMENT_FRAMES;
    return n < most ? n : most;
}

static void open_segment(page *p, int64_t s)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    const kvf_merge_segment *g = &plan->segment[s];
    const double *time = p->in->tokens->time;
    char from[32], to[32], n_in[32];
    buffer *b = &p->out;
    /* A short segment is as wide as its frames, so that the next one stands beside it. */
    buffer_printf(b, "<section class=s%d style=\"--n:%" PRId64 "\"><h3>Segment %" PRId64 "</h3><p>",
                  (int)(s % 2), shown_of(plan, s), s + 1);
    if (g->first == g->last)
        buffer_printf(b, "frame %d", g->first);
    else
        buffer_printf(b, "frames %d to %d", g->first, g->last);
    if (time && g->first == g->last) buffer_printf(b, " &middot; %s", clock_text(from, time[g->first]));
    if (time && g->first < g->last)
        buffer_printf(b, " &middot; %s to %s", clock_text(from, time[g->first]),
                      clock_text(to, time[g->last]));
    buffer_printf(b, " &middot; <b>%s &rarr; %" PRId64 "</b> tokens",
                  report_count(n_in, (int64_t)(g->last - g->first + 1) * plan->n_tok), p->used[s]);
    if (shown_of(plan, s) < g->last - g->first + 1)
        buffer_printf(b, " &middot; %" PRId64 " frames shown", shown_of(plan, s));
    if (g->static_in)
        buffer_printf(b, " &middot; %d positions stand still &rarr; %d", g->static_in, g->static_kept);
    buffer_add_text(b, "</p><div class=sheet>\n");
}

static void add_sheet(page *p)
{
    const kvf_merge_plan_info *plan = p->in->plan;
    buffer *b = &p->out;
    int64_t n_segment = plan->n_segment < VIDEO_PAGE_FRAMES ? plan->n_segment : VIDEO_PAGE_FRAMES;
    buffer_add_text(
        b, "<h2>Frames</h2>\n<p class=key><i class=k></i>copied <i class=c></i>centre of merged ones <i "
           "class=m></i>merged "
           "into another <i class=d></i>dropped; the number at a frame's right is how many tokens it keeps");
    if (n_segment < plan->n_segment)
        buffer_printf(b, "; the first %" PRId64 " of %" PRId64 " segments are shown", n_segment,
                      plan->n_segment);
    buffer_add_text(
        b, "</p>\n<input type=checkbox id=plain><label for=plain>pictures only</label>\n<div id=sheets>\n");
    for (int64_t s = 0; s < n_segment; s++) {
        int64_t first = plan->segment[s].first, n = plan->segment[s].last - first + 1,
                shown = shown_of(plan, s);
        open_segment(p, s);
        for (int64_t i = 0; i < shown; i++) add_frame(p, first + (shown > 1 ? i * (n - 1) / (shown - 1) : 0));
        buffer_add_text(b, "</div></section>\n");
    }
    buffer_add_text(b, "</div>\n");
}

static void write_page(page *p)
{
    buffer *b = &p->out;
    buffer_add_text(b, "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport "
                       "content=\"width=device-width\">\n<title>");
    add_escaped(b, p->in->title);
    buffer_add_text(b, " - kvfold video</title>\n<style>\n");
    buffer_add_text(b, video_style);
    buffer_add_text(b, "</style>\n<main>\n<h1>");
    add_escaped(b, p->in->title);
    buffer_add_text(b, "</h1>\n<p class=lead>What <b>");
    char method[64];
    snprintf(method, sizeof method, "%.*s", (int)strcspn(p->in->plan->spec, ":"), p->in->plan->spec);
    add_escaped(b, method);
    buffer_add_text(b, "</b> keeps of this video</p>\n");
    add_summary(p);
    add_chart(p);
    add_sheet(p);
    add_details(p);
    buffer_add_text(b, "</main>\n</html>\n");
}

kvf_status video_report_write(const char *path, const video_page *in, kvf_error *err)
{
    const kvf_merge_plan_info *plan = in->plan;
    page p = { .in = in, .grid_w = plan->grid_w > 0 ? plan->grid_w : plan->n_tok };
    p.grid_h = plan->n_tok / p.grid_w;
    p.fates = malloc((size_t)(plan->n_frame * plan->n_tok));
    p.count = calloc((size_t)plan->n_frame, sizeof *p.count);
    p.used = calloc((size_t)plan->n_segment, sizeof *p.used);
    outfile o;
    kvf_status rc = p.fates && p.count && p.used ? KVF_OK : KVF_ERR_NOMEM;
    if (rc == KVF_OK) {
        count(&p);
        write_page(&p);
    }
    if (rc != KVF_OK || p.out.failed)
        rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the page '%s'.", path);
    if (rc == KVF_OK) rc = outfile_open(&o, path, err);
    if (rc == KVF_OK) {
        interrupt_remove(o.partial);
        outfile_write(&o, p.out.v, p.out.n);
        rc = outfile_commit(&o, err);
        interrupt_remove(NULL);
    }
    buffer_free(&p.out);
    free(p.fates);
    free(p.count);
    free(p.used);
    return rc;
}
