/* video_rgb.c - see video_rgb.h; and thumbnails.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifdef KVFOLD_HAVE_LIBAV

#include "video_rgb.h"

#include <stdlib.h>
#include <string.h>

#include <libavcodec/avcodec.h>
#include <libavutil/opt.h>
#include <libavutil/pixdesc.h>

#include "report.h"

/* The scaler writes whole vectors: rows end, and the picture ends, with this room. */
#define SLACK 64
/* JPEG quality as FFmpeg counts it, 2 (best) to 31. */
#define JPEG_QUALITY 4

static bool reserve(uint8_t **v, size_t *cap, size_t n)
{
    if (n <= *cap) return true;
    free(*v);
    *v = malloc(n);
    *cap = *v ? n : 0;
    return *v != NULL;
}

/* The old full-range formats are the plain ones with a flag. */
static enum AVPixelFormat plain_format(enum AVPixelFormat f, int *full_range)
{
    static const struct {
        enum AVPixelFormat old, plain;
    } pairs[] = {
        { AV_PIX_FMT_YUVJ420P, AV_PIX_FMT_YUV420P }, { AV_PIX_FMT_YUVJ422P, AV_PIX_FMT_YUV422P },
        { AV_PIX_FMT_YUVJ444P, AV_PIX_FMT_YUV444P }, { AV_PIX_FMT_YUVJ440P, AV_PIX_FMT_YUV440P },
        { AV_PIX_FMT_YUVJ411P, AV_PIX_FMT_YUV411P },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i].old == f) {
            *full_range = 1;
            return pairs[i].plain;
        }
    return f;
}

/* Colours as the stream says; where it says nothing, as FFmpeg's own programs assume. */
static void set_colours(video_rgb *r, const AVFrame *frame, int full_range)
{
    int colours = frame->colorspace == AVCOL_SPC_UNSPECIFIED || frame->colorspace == AVCOL_SPC_RGB
                      ? SWS_CS_DEFAULT
                      : (int)frame->colorspace;
    if (r->colours == colours && r->full_range == full_range) return;
    const int *from = sws_getCoefficients(colours), *to = sws_getCoefficients(SWS_CS_DEFAULT);
    sws_setColorspaceDetails(r->scaler, from, full_range, to, 1, 0, 1 << 16, 1 << 16);
    r->colours = colours;
    r->full_range = full_range;
}

static void turn(uint8_t *to, int64_t to_stride, const uint8_t *from, int64_t from_stride, const int size[2],
                 int rotation)
{
    int w = size[0], h = size[1]; /* of `from` */
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) {
            int64_t tx = rotation == 90 ? h - 1 - y : rotation == 180 ? w - 1 - x : y;
            int64_t ty = rotation == 90 ? x : rotation == 180 ? h - 1 - y : w - 1 - x;
            memcpy(to + ty * to_stride + tx * 3, from + y * from_stride + (int64_t)x * 3, 3);
        }
}

kvf_status video_rgb_convert(video_rgb *r, const AVFrame *frame, int rotation, video_frame *out,
                             kvf_error *err)
{
    int w = frame->width, h = frame->height, full = frame->color_range == AVCOL_RANGE_JPEG;
    enum AVPixelFormat format = plain_format((enum AVPixelFormat)frame->format, &full);
    struct SwsContext *before = r->scaler;
    r->scaler =
        sws_isSupportedInput(format)
            ? sws_getCachedContext(r->scaler, w, h, format, w, h, AV_PIX_FMT_RGB24,
                                   SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT, NULL, NULL, NULL)
            : NULL;
    if (!r->scaler) {
        sws_freeContext(sws_isSupportedInput(format) ? NULL : before);
        const char *name = av_get_pix_fmt_name(format);
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "Pictures of format %s cannot be turned into RGB; convert the clip "
                           "to yuv420p.",
                           name ? name : "unknown");
    }
    if (r->scaler != before) r->colours = -1;
    set_colours(r, frame, full);

    int64_t stride = ((int64_t)w * 3 + 2 * SLACK - 1) / SLACK * SLACK;
    bool upright = rotation == 0, side = rotation == 90 || rotation == 270;
    int64_t turned_stride = (int64_t)(side ? h : w) * 3;
    if (!reserve(&r->flat, &r->flat_cap, (size_t)(stride * h + SLACK)) ||
        (!upright && !reserve(&r->turned, &r->turned_cap, (size_t)(turned_stride * (side ? w : h)))))
        return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for a picture of %d x %d.", w, h);
    uint8_t *to[4] = { r->flat, NULL, NULL, NULL };
    int strides[4] = { (int)stride, 0, 0, 0 };
    if (sws_scale(r->scaler, (const uint8_t *const *)frame->data, frame->linesize, 0, h, to, strides) <= 0)
        return report_fail(err, KVF_ERR_NOMEM, "A picture of %d x %d could not be turned into RGB.", w, h);
    if (!upright) turn(r->turned, turned_stride, r->flat, stride, (int[2]){ w, h }, rotation);
    out->rgb = upright ? r->flat : r->turned;
    out->stride = upright ? stride : turned_stride;
    out->width = side ? h : w;
    out->height = side ? w : h;
    return KVF_OK;
}

void video_rgb_free(video_rgb *r)
{
    sws_freeContext(r->scaler);
    free(r->flat);
    free(r->turned);
    *r = (video_rgb){ 0 };
}

/* ---- Thumbnails -------------------------------------------------------------------------- */

static AVFrame *shrunk(const video_frame *from, int w, int h)
{
    AVFrame *f = av_frame_alloc();
    if (!f) return NULL;
    f->format = AV_PIX_FMT_YUVJ420P;
    f->width = w;
    f->height = h;
    f->color_range = AVCOL_RANGE_JPEG;
    f->quality = JPEG_QUALITY * FF_QP2LAMBDA;
    struct SwsContext *s =
        av_frame_get_buffer(f, 0) < 0
            ? NULL
            : sws_getContext(from->width, from->height, AV_PIX_FMT_RGB24, w, h, AV_PIX_FMT_YUV420P,
                             SWS_AREA | SWS_ACCURATE_RND, NULL, NULL, NULL);
    const uint8_t *data[4] = { from->rgb, NULL, NULL, NULL };
    int strides[4] = { (int)from->stride, 0, 0, 0 };
    if (s) /* to full-range colours, which JPEG has */
        sws_setColorspaceDetails(s, sws_getCoefficients(SWS_CS_DEFAULT), 1,
                                 sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, 1 << 16, 1 << 16);
    if (!s || sws_scale(s, data, strides, 0, from->height, f->data, f->linesize) <= 0) av_frame_free(&f);
    sws_freeContext(s);
    return f;
}

bool video_jpeg(buffer *out, const video_frame *frame, int max_side)
{
    int long_side = frame->width > frame->height ? frame->width : frame->height;
    double scale = long_side > max_side ? (double)max_side / long_side : 1;
    int w = (int)(frame->width * scale + 0.5), h = (int)(frame->height * scale + 0.5);
    if (w < 1) w = 1;
    if (h < 1) h = 1;
    const AVCodec *encoder = avcodec_find_encoder(AV_CODEC_ID_MJPEG);
    AVCodecContext *c = encoder ? avcodec_alloc_context3(encoder) : NULL;
    AVFrame *small = c ? shrunk(frame, w, h) : NULL;
    AVPacket *packet = small ? av_packet_alloc() : NULL;
    bool done = false;
    if (packet) {
        c->width = w;
        c->height = h;
        c->pix_fmt = AV_PIX_FMT_YUVJ420P;
        c->color_range = AVCOL_RANGE_JPEG;
        c->time_base = (AVRational){ 1, 25 };
        c->thread_count = 1;
        c->flags |= AV_CODEC_FLAG_QSCALE;
        c->global_quality = small->quality;
        done = avcodec_open2(c, encoder, NULL) >= 0 && avcodec_send_frame(c, small) >= 0 &&
               avcodec_send_frame(c, NULL) >= 0 && avcodec_receive_packet(c, packet) >= 0;
        if (done) buffer_add(out, packet->data, (size_t)packet->size);
    }
    av_packet_free(&packet);
    av_frame_free(&small);
    avcodec_free_context(&c);
    return done && !out->failed;
}

#else
typedef int video_rgb_is_empty; /* a file without declarations is no C */
#endif
