/* video_decode.c - see video_decode.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_decode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

#ifdef KVFOLD_HAVE_LIBAV

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/avstring.h>
#include <libavutil/display.h>
#include <libavutil/pixdesc.h>

#include "video_rgb.h"

#define IO_BUFFER 65536
/* Packets of one clip that are listed: 92 hours at 60 frames a second. */
#define MAX_PACKETS 20000000
/* A jump costs about as much as decoding so many frames. */
#define JUMP_WORTH 16
/* Frames lost in a row after which a clip has ended. */
#define MAX_LOST 1000
/* Times that fall back by more seconds than this start again, as in recordings put together. */
#define MAX_REORDER 10.0

/* FFmpeg's threads meet in atomic operations of its own, which the thread sanitizer does not see. */
#if defined(__SANITIZE_THREAD__)
#define MAX_THREADS 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MAX_THREADS 1
#endif
#endif
#ifndef MAX_THREADS
#define MAX_THREADS 16 /* each holds a picture */
#endif

typedef struct listed {
    int64_t pts; /* in the stream's time base; in a clip without times the frame's number */
    bool key;
} listed;

struct video {
    char *path;
    int fd, threads;
    AVFormatContext *fmt;
    AVStream *stream; /* of fmt */
    AVCodecContext *codec;
    AVPacket *packet;
    AVFrame *frame;
    video_rgb rgb;
    video_info info;
    listed *list; /* [n_list] ascending pts, each once */
    int64_t n_list;
    int64_t *chosen; /* [n_chosen] places in list */
    int64_t n_chosen;
    bool counted;   /* some packet has no time: frames are told apart by counting */
    bool no_jumps;  /* a jump went wrong once */
    int64_t number; /* frames decoded since the start; used when counted */
    int64_t last;   /* pts of the frame decoded last; INT64_MIN: none */
};

bool video_built_in(void) { return true; }

const char *video_library(void)
{
    static const char text[] = "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION_MAJOR) "." AV_STRINGIFY(
        LIBAVCODEC_VERSION_MINOR) "." AV_STRINGIFY(LIBAVCODEC_VERSION_MICRO);
    return text;
}

const video_info *video_get_info(const video *v) { return &v->info; }

/* ---- One file descriptor, nothing else --------------------------------------------------- */

static int read_bytes(void *user, uint8_t *out, int n)
{
    const video *v = user;
    ssize_t got;
    do got = read(v->fd, out, (size_t)n);
    while (got < 0 && errno == EINTR);
    return got < 0 ? AVERROR(errno) : got == 0 ? AVERROR_EOF : (int)got;
}

static int64_t seek_to(void *user, int64_t offset, int whence)
{
    const video *v = user;
    struct stat st;
    if (whence == AVSEEK_SIZE) return fstat(v->fd, &st) == 0 ? (int64_t)st.st_size : AVERROR(errno);
    off_t at = lseek(v->fd, (off_t)offset, whence & ~AVSEEK_FORCE);
    return at < 0 ? AVERROR(errno) : (int64_t)at;
}

/* Play lists and containers may name other files and addresses: none is opened. */
static int refuse_open(AVFormatContext *s, AVIOContext **pb, const char *url, int flags,
                       AVDictionary **options)
{
    (void)s;
    (void)pb;
    (void)url;
    (void)flags;
    (void)options;
    return AVERROR(EPERM);
}

static kvf_status no_memory(const video *v, kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to read '%s'.", v->path);
}

static kvf_status failed(const video *v, int code, const char *what, kvf_error *err)
{
    char why[128] = "";
    if (code == AVERROR(ENOMEM)) return no_memory(v, err);
    av_strerror(code, why, sizeof why);
    return report_fail(err, KVF_ERR_FORMAT, "'%s' %s (%s).", v->path, what, why);
}

static void close_format(video *v)
{
    if (!v->fmt) return;
    AVIOContext *pb = v->fmt->pb;
    avformat_close_input(&v->fmt);
    if (pb) av_freep(&pb->buffer);
    avio_context_free(&pb);
    v->stream = NULL;
}

/* Formats that name other files or addresses instead of holding pictures. */
static const char lists[] = "hls,applehttp,concat,dash,sdp,rtsp,imf,webm_dash_manifest";

/* Find the format from the first bytes; the file's name tells nothing that they do not. */
static kvf_status probe(const video *v, AVIOContext *pb, const AVInputFormat **format, kvf_error *err)
{
    int rc = av_probe_input_buffer2(pb, format, "", NULL, 0, 0);
    if (rc < 0) return failed(v, rc, "is no video that FFmpeg reads, or it is damaged or cut off", err);
    if (av_match_name((*format)->name, lists))
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "'%s' is a list of other files (%s); name the video itself.", v->path,
                           (*format)->name);
    return KVF_OK;
}

static kvf_status open_format(video *v, kvf_error *err)
{
    if (lseek(v->fd, 0, SEEK_SET) < 0)
        return report_fail(err, KVF_ERR_IO, "Cannot read '%s': %s.", v->path, strerror(errno));
    unsigned char *bytes = av_malloc(IO_BUFFER);
    AVIOContext *pb = bytes ? avio_alloc_context(bytes, IO_BUFFER, 0, v, read_bytes, NULL, seek_to) : NULL;
    v->fmt = pb ? avformat_alloc_context() : NULL;
    if (!v->fmt) {
        av_free(pb ? pb->buffer : bytes);
        avio_context_free(&pb);
        return no_memory(v, err);
    }
    const AVInputFormat *format = NULL;
    v->fmt->pb = pb;
    v->fmt->flags |= AVFMT_FLAG_CUSTOM_IO; /* from here on close_format frees pb */
    kvf_status probed = probe(v, pb, &format, err);
    if (probed != KVF_OK) {
        close_format(v);
        return probed;
    }
    v->fmt->io_open = refuse_open;
    AVDictionary *options = NULL;
    av_dict_set(&options, "protocol_whitelist", "none", 0);
    int rc = avformat_open_input(&v->fmt, "", format, &options);
    av_dict_free(&options);
    if (rc < 0) { /* fmt is freed, the buffer is not */
        v->fmt = NULL;
        av_freep(&pb->buffer);
        avio_context_free(&pb);
        return failed(v, rc, "is no video that FFmpeg reads, or it is damaged or cut off", err);
    }
    rc = avformat_find_stream_info(v->fmt, NULL);
    return rc < 0 ? failed(v, rc, "is damaged: its streams cannot be told", err) : KVF_OK;
}

/* ---- The stream and its codec ------------------------------------------------------------ */

/* Text shown as pictures by FFmpeg: a document given by mistake is no clip. */
static bool is_text(enum AVCodecID id)
{
    return id == AV_CODEC_ID_ANSI || id == AV_CODEC_ID_BINTEXT || id == AV_CODEC_ID_XBIN ||
           id == AV_CODEC_ID_IDF;
}

static kvf_status find_stream(video *v, kvf_error *err)
{
    int best = -1, n_audio = 0;
    for (unsigned i = 0; i < v->fmt->nb_streams; i++) {
        AVStream *s = v->fmt->streams[i];
        enum AVMediaType kind = s->codecpar->codec_type;
        n_audio += kind == AVMEDIA_TYPE_AUDIO;
        bool cover = (s->disposition & AV_DISPOSITION_ATTACHED_PIC) != 0;
        if (kind != AVMEDIA_TYPE_VIDEO || cover || is_text(s->codecpar->codec_id)) continue;
        if (best < 0 || (s->disposition & AV_DISPOSITION_DEFAULT &&
                         !(v->fmt->streams[best]->disposition & AV_DISPOSITION_DEFAULT)))
            best = (int)i;
    }
    for (unsigned i = 0; i < v->fmt->nb_streams; i++)
        v->fmt->streams[i]->discard = (int)i == best ? AVDISCARD_DEFAULT : AVDISCARD_ALL;
    if (best >= 0) {
        v->stream = v->fmt->streams[best];
        return KVF_OK;
    }
    return report_fail(err, KVF_ERR_FORMAT,
                       n_audio ? "'%s' holds sound only, no pictures; name a video." : "'%s' holds no video.",
                       v->path);
}

static kvf_status check_size(const video *v, int width, int height, kvf_error *err)
{
    if (width > 0 && height > 0 && (int64_t)width * height <= VIDEO_MAX_PIXELS) return KVF_OK;
    if (width <= 0 || height <= 0)
        return report_fail(err, KVF_ERR_FORMAT, "'%s' is damaged: its pictures are %d x %d.", v->path, width,
                           height);
    return report_fail(err, KVF_ERR_LIMIT,
                       "The pictures of '%s' are %d x %d, larger than the %d million pixels that "
                       "are read; scale the clip down first.",
                       v->path, width, height, (int)(VIDEO_MAX_PIXELS / 1000000));
}

static kvf_status open_codec(video *v, kvf_error *err)
{
    const AVCodecParameters *par = v->stream->codecpar;
    const AVCodec *decoder = avcodec_find_decoder(par->codec_id);
    snprintf(v->info.codec, sizeof v->info.codec, "%s", avcodec_get_name(par->codec_id));
    if (par->codec_id == AV_CODEC_ID_NONE)
        return report_fail(err, KVF_ERR_FORMAT,
                           "'%s' is damaged or cut off: it does not say how its pictures are coded.",
                           v->path);
    if (!decoder)
        return report_fail(
            err, KVF_ERR_UNSUPPORTED,
            "'%s' is coded as %s, for which this machine's FFmpeg has no decoder; convert it to H.264.",
            v->path, v->info.codec);
    kvf_status rc = check_size(v, par->width, par->height, err);
    if (rc != KVF_OK) return rc;
    v->codec = avcodec_alloc_context3(decoder);
    if (!v->codec) return no_memory(v, err);
    int code = avcodec_parameters_to_context(v->codec, par);
    v->codec->pkt_timebase = v->stream->time_base;
    v->codec->thread_count = v->threads;
    v->codec->max_pixels = VIDEO_MAX_PIXELS;
    if (code >= 0) code = avcodec_open2(v->codec, decoder, NULL);
    return code < 0 ? failed(v, code, "cannot be decoded", err) : KVF_OK;
}

static int clockwise(const AVStream *stream)
{
    const uint8_t *bytes = NULL;
#if LIBAVFORMAT_VERSION_INT >= AV_VERSION_INT(60, 15, 100)
    const AVPacketSideData *side = av_packet_side_data_get(
        stream->codecpar->coded_side_data, stream->codecpar->nb_coded_side_data, AV_PKT_DATA_DISPLAYMATRIX);
    if (side && side->size >= 9 * sizeof(int32_t)) bytes = side->data;
#else
    size_t n = 0;
    bytes = av_stream_get_side_data(stream, AV_PKT_DATA_DISPLAYMATRIX, &n);
    if (n < 9 * sizeof(int32_t)) bytes = NULL;
#endif
    if (!bytes) return 0;
    int32_t matrix[9];
    memcpy(matrix, bytes, sizeof matrix);
    double angle = -av_display_rotation_get(matrix); /* counter-clockwise; NaN: no rotation */
    for (int quarter = -3; quarter <= 3; quarter++)
        if (angle > quarter * 90 - 10 && angle < quarter * 90 + 10) return (quarter * 90 + 360) % 360;
    return 0;
}

/* ---- The list of frames ------------------------------------------------------------------ */

static int by_pts(const void *a, const void *b)
{
    int64_t x = ((const listed *)a)->pts, y = ((const listed *)b)->pts;
    return (x > y) - (x < y);
}

static kvf_status add_listed(video *v, int64_t *cap, listed item, kvf_error *err)
{
    if (v->n_list == MAX_PACKETS)
        return report_fail(err, KVF_ERR_LIMIT, "'%s' has more than %d frames; cut it.", v->path, MAX_PACKETS);
    if (v->n_list == *cap) {
        int64_t more = *cap ? *cap * 2 : 1024;
        listed *list = realloc(v->list, (size_t)more * sizeof *list);
        if (!list) return no_memory(v, err);
        v->list = list;
        *cap = more;
    }
    v->list[v->n_list++] = item;
    return KVF_OK;
}

/* Every packet of the stream is a frame; those marked DISCARD are decoded but not shown. */
static kvf_status list_frames(video *v, kvf_error *err)
{
    int64_t cap = 0;
    double latest = -INFINITY, tick = av_q2d(v->stream->time_base);
    kvf_status rc = KVF_OK;
    int code = 0;
    while (rc == KVF_OK && (code = av_read_frame(v->fmt, v->packet)) >= 0) {
        bool mine = v->packet->stream_index == v->stream->index && !(v->packet->flags & AV_PKT_FLAG_DISCARD);
        if (v->packet->flags & AV_PKT_FLAG_CORRUPT) v->info.damaged = true;
        double time = (double)v->packet->pts * tick;
        if (mine && (v->packet->pts == AV_NOPTS_VALUE || time < latest - MAX_REORDER)) v->counted = true;
        if (mine && time > latest) latest = time;
        if (mine)
            rc = add_listed(v, &cap, (listed){ v->packet->pts, (v->packet->flags & AV_PKT_FLAG_KEY) != 0 },
                            err);
        av_packet_unref(v->packet);
    }
    if (rc != KVF_OK) return rc;
    if (code == AVERROR(ENOMEM)) return no_memory(v, err);
    if (code != AVERROR_EOF || v->fmt->pb->error) v->info.damaged = true;
    if (!v->n_list)
        return report_fail(err, KVF_ERR_FORMAT, "'%s' holds no frame; it is empty or cut off.", v->path);
    if (v->counted) {
        for (int64_t i = 0; i < v->n_list; i++) v->list[i].pts = i;
        return KVF_OK;
    }
    qsort(v->list, (size_t)v->n_list, sizeof *v->list, by_pts);
    int64_t n = 1; /* two fields of a picture may come with one time */
    for (int64_t i = 1; i < v->n_list; i++)
        if (v->list[i].pts != v->list[n - 1].pts) v->list[n++] = v->list[i];
    v->n_list = n;
    return KVF_OK;
}

static double rate_of(const video *v)
{
    AVRational r = av_guess_frame_rate(v->fmt, v->stream, NULL);
    double fps = r.num > 0 && r.den > 0 ? av_q2d(r) : 0;
    return fps > 0 && fps < 100000 ? fps : 25;
}

/* Seconds from the first frame. Differences go through double: times in a hostile file span all of int64. */
static double time_of(const video *v, int64_t place)
{
    double ticks = (double)v->list[place].pts - (double)v->list[0].pts;
    return v->counted ? ticks / rate_of(v) : ticks * av_q2d(v->stream->time_base);
}

static void fill_info(video *v)
{
    video_info *i = &v->info;
    snprintf(i->container, sizeof i->container, "%s", v->fmt->iformat->name);
    i->rotation = clockwise(v->stream);
    bool turned = i->rotation == 90 || i->rotation == 270;
    i->width = turned ? v->stream->codecpar->height : v->stream->codecpar->width;
    i->height = turned ? v->stream->codecpar->width : v->stream->codecpar->height;
    i->n_frames = v->n_list;
    double span = time_of(v, v->n_list - 1);
    i->fps = v->n_list > 1 && span > 0 ? (double)(v->n_list - 1) / span : 0;
    i->seconds_said = v->fmt->duration > 0 ? (double)v->fmt->duration / AV_TIME_BASE : 0;
    i->seconds = i->fps > 0 ? span + 1 / i->fps : 0;
}

kvf_status video_open(video **out, const char *path, int threads, kvf_error *err)
{
    *out = NULL;
    av_log_set_level(AV_LOG_QUIET);
    if (strcmp(path, "-") == 0)
        return report_fail(err, KVF_ERR_ARG,
                           "A clip is read more than once, so it must be a file, not standard input.");
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return report_fail(err, KVF_ERR_IO, "Cannot open '%s': %s.", path, strerror(errno));
    struct stat st;
    kvf_status rc = KVF_OK;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
        rc = report_fail(err, KVF_ERR_ARG,
                         "'%s' is no regular file; a clip is read more than once, so it must be one.", path);
    else if (st.st_size == 0)
        rc = report_fail(err, KVF_ERR_FORMAT, "'%s' is empty.", path);
    size_t n = strlen(path) + 1;
    video *v = rc == KVF_OK ? calloc(1, sizeof *v) : NULL;
    char *copy = v ? malloc(n) : NULL;
    if (rc == KVF_OK && !copy) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory to read '%s'.", path);
    if (rc != KVF_OK) {
        free(v);
        close(fd);
        return rc;
    }
    memcpy(copy, path, n);
    *v = (video){
        .path = copy, .fd = fd, .threads = threads < MAX_THREADS ? threads : MAX_THREADS, .last = INT64_MIN
    };
    v->packet = av_packet_alloc();
    v->frame = av_frame_alloc();
    if (!v->packet || !v->frame) rc = no_memory(v, err);
    if (rc == KVF_OK) rc = open_format(v, err);
    if (rc == KVF_OK) rc = find_stream(v, err);
    if (rc == KVF_OK) rc = open_codec(v, err);
    if (rc == KVF_OK) rc = list_frames(v, err);
    if (rc != KVF_OK) {
        video_close(v);
        return rc;
    }
    fill_info(v);
    *out = v;
    return KVF_OK;
}

void video_close(video *v)
{
    if (!v) return;
    avcodec_free_context(&v->codec);
    close_format(v);
    av_packet_free(&v->packet);
    av_frame_free(&v->frame);
    video_rgb_free(&v->rgb);
    close(v->fd);
    free(v->list);
    free(v->chosen);
    free(v->path);
    free(v);
}

kvf_status video_choose(video *v, const frame_request *q, int64_t *n, kvf_error *err)
{
    int64_t cap = v->n_list < FRAME_CHOICE_MAX ? v->n_list : FRAME_CHOICE_MAX;
    double *time = malloc((size_t)v->n_list * sizeof *time);
    int64_t *chosen = malloc((size_t)cap * sizeof *chosen);
    kvf_status rc = time && chosen ? KVF_OK : no_memory(v, err);
    for (int64_t i = 0; i < v->n_list && rc == KVF_OK; i++) time[i] = time_of(v, i);
    if (rc == KVF_OK) rc = frame_choose(time, v->n_list, q, chosen, cap, n, err);
    free(time);
    if (rc != KVF_OK) {
        free(chosen);
        return rc;
    }
    free(v->chosen);
    v->chosen = chosen;
    v->n_chosen = *n;
    return KVF_OK;
}

/* ---- Decoding ---------------------------------------------------------------------------- */

/* Back to the first frame: by a jump, whose outcome is to be checked (*jumped), or by opening the file again.
 */
static kvf_status rewind_clip(video *v, bool *jumped, kvf_error *err)
{
    avcodec_flush_buffers(v->codec);
    v->number = 0;
    v->last = INT64_MIN;
    int at = v->stream->index;
    *jumped =
        !v->counted && !v->no_jumps && av_seek_frame(v->fmt, at, v->list[0].pts, AVSEEK_FLAG_BACKWARD) >= 0;
    if (*jumped) return KVF_OK;
    close_format(v);
    kvf_status rc = open_format(v, err);
    if (rc == KVF_OK) rc = find_stream(v, err);
    if (rc == KVF_OK && v->stream->index != at)
        rc = report_fail(err, KVF_ERR_FORMAT, "'%s' changed while it was read.", v->path);
    return rc;
}

/* Jump to the last key frame up to list[place] if that leaves out enough frames; true if it did. */
static bool jump(video *v, int64_t place)
{
    if (v->counted || v->no_jumps) return false;
    int64_t key = place, skipped = 0;
    while (key > 0 && !v->list[key].key) key--;
    while (skipped < JUMP_WORTH && key > skipped && v->list[key - skipped].pts > v->last) skipped++;
    if (skipped < JUMP_WORTH) return false;
    if (av_seek_frame(v->fmt, v->stream->index, v->list[key].pts, AVSEEK_FLAG_BACKWARD) < 0) {
        v->no_jumps = true; /* from here on in order, which needs nothing more */
        return false;
    }
    avcodec_flush_buffers(v->codec);
    return true;
}

/* The next decoded frame. KVF_DONE: no more. */
static kvf_status next_frame(video *v, kvf_error *err)
{
    for (int lost = 0; lost < MAX_LOST;) {
        int code = avcodec_receive_frame(v->codec, v->frame);
        if (code >= 0) return KVF_OK;
        if (code == AVERROR_EOF) return KVF_DONE;
        if (code == AVERROR(ENOMEM)) return no_memory(v, err);
        if (code != AVERROR(EAGAIN)) {
            lost++; /* one frame; the next call goes on */
            continue;
        }
        do {
            av_packet_unref(v->packet);
            code = av_read_frame(v->fmt, v->packet);
        } while (code >= 0 && v->packet->stream_index != v->stream->index);
        /* What follows an unreadable place cannot be found: that is the end, too. */
        int sent = avcodec_send_packet(v->codec, code >= 0 ? v->packet : NULL);
        av_packet_unref(v->packet);
        if (sent == AVERROR(ENOMEM)) return no_memory(v, err);
        if (code < 0 && sent < 0 && sent != AVERROR(EAGAIN)) return KVF_DONE;
    }
    return KVF_DONE;
}

/* Where the decoded frame stands, in the units of list. */
static int64_t place_in_time(video *v)
{
    int64_t pts = v->counted ? v->number : v->frame->best_effort_timestamp;
    v->number++;
    if (pts == AV_NOPTS_VALUE) pts = v->last < INT64_MAX - 1 ? v->last + 1 : v->last;
    return pts;
}

/* Hand over the decoded frame as number `place` of the list. */
static kvf_status hand_over(video *v, int64_t place, video_sink sink, void *user, video_outcome *o,
                            kvf_error *err)
{
    kvf_status rc = check_size(v, v->frame->width, v->frame->height, err);
    video_frame f = { .number = place, .time = time_of(v, place) };
    f.damaged = v->frame->decode_error_flags || v->frame->flags & AV_FRAME_FLAG_CORRUPT;
    if (rc == KVF_OK) rc = video_rgb_convert(&v->rgb, v->frame, v->info.rotation, &f, err);
    if (rc == KVF_OK) rc = sink(user, &f, err);
    if (rc != KVF_OK) return rc;
    o->n_frames++;
    o->n_damaged += f.damaged;
    return KVF_OK;
}

/* Chosen frames from `at` on that the decoded one at pts stands for: the last of them is shown. */
static int64_t due(const video *v, int64_t at, int64_t pts)
{
    int64_t n = 0;
    while (at + n < v->n_chosen && v->list[v->chosen[at + n]].pts <= pts) n++;
    return n;
}

/* The outcome of a jump is known with the first frame after it (or with none): behind the goal, everything is
 * read again in order. Sets *again if so. */
static kvf_status check_jump(video *v, int64_t goal, kvf_status got, bool *again, kvf_error *err)
{
    *again = got == KVF_DONE || v->frame->best_effort_timestamp > v->list[goal].pts;
    if (!*again) return KVF_OK;
    bool jumped;
    v->no_jumps = true;
    return rewind_clip(v, &jumped, err);
}

kvf_status video_read(video *v, video_sink sink, void *user, video_outcome *outcome, kvf_error *err)
{
    *outcome = (video_outcome){ 0 };
    bool jumped = false;
    kvf_status rc = rewind_clip(v, &jumped, err);
    for (int64_t at = 0, aimed = -1; rc == KVF_OK && at < v->n_chosen;) {
        if (aimed != at && jump(v, v->chosen[at])) jumped = true;
        aimed = at;
        kvf_status got = next_frame(v, err);
        if (got != KVF_OK && got != KVF_DONE) rc = got;
        bool again = false;
        if (rc == KVF_OK && jumped) rc = check_jump(v, v->chosen[at], got, &again, err);
        jumped = false;
        if (rc != KVF_OK || again) continue;
        if (got == KVF_DONE) break;
        int64_t pts = v->last = place_in_time(v), n = due(v, at, pts);
        if (n) rc = hand_over(v, v->chosen[at + n - 1], sink, user, outcome, err);
        at += n;
    }
    av_frame_unref(v->frame);
    outcome->n_missing = v->n_chosen - outcome->n_frames;
    if (rc != KVF_OK || outcome->n_frames) return rc;
    return report_fail(err, KVF_ERR_FORMAT,
                       "No frame of '%s' can be decoded: the clip is damaged, or coded in a way "
                       "that this FFmpeg does not know.",
                       v->path);
}

#else

bool video_built_in(void) { return false; }
const char *video_library(void) { return ""; }

kvf_status video_open(video **out, const char *path, int threads, kvf_error *err)
{
    (void)threads;
    *out = NULL;
    return report_fail(
        err, KVF_ERR_UNSUPPORTED,
        "This build decodes no video, so '%s' cannot be read: install libavformat-dev, libavcodec-dev, "
        "libavutil-dev and libswscale-dev and build again, or give features with --features.",
        path);
}

void video_close(video *v) { (void)v; }
const video_info *video_get_info(const video *v)
{
    (void)v;
    return NULL;
}

kvf_status video_choose(video *v, const frame_request *q, int64_t *n, kvf_error *err)
{
    (void)v;
    (void)q;
    *n = 0;
    return report_fail(err, KVF_ERR_UNSUPPORTED, "This build decodes no video.");
}

kvf_status video_read(video *v, video_sink sink, void *user, video_outcome *outcome, kvf_error *err)
{
    (void)v;
    (void)sink;
    (void)user;
    *outcome = (video_outcome){ 0 };
    return report_fail(err, KVF_ERR_UNSUPPORTED, "This build decodes no video.");
}

bool video_jpeg(buffer *out, const video_frame *frame, int max_side)
{
    (void)out;
    (void)frame;
    (void)max_side;
    return false;
}

#endif
