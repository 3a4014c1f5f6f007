#!/usr/bin/env python3
# make_clips.py [OUT_DIR] - the clips of tests/data/video; needs the program ffmpeg.
#
# Every frame says which one it is: its number stands in the top rows as seven black or white squares, the
# lowest bit first, which survive any codec. Below them the picture stands still but for a square that
# moves, and changes altogether at frame 60.
#
# SPDX-License-Identifier: Apache-2.0
import math
import os
import subprocess
import sys

W, H, N = 112, 64, 120
BITS = 7


def pixel(n, x, y):
    if y < 16:
        return (235, 235, 235) if n >> (x * BITS // W) & 1 else (20, 20, 20)
    left = 8 + (n % 60) * 3 // 2
    if left <= x < left + 12 and 36 <= y < 48:
        return (250, 220, 60)
    if n < 60:
        return (40 + x, 60 + y, 120)
    return (200 - y, 90, 60 + (x * y) % 64)


def frames():
    return b"".join(bytes(c for y in range(H) for x in range(W) for c in pixel(n, x, y)) for n in range(N))


def sound(seconds):
    return b"".join(int(8000 * math.sin(i * 0.1)).to_bytes(2, "little", signed=True) for i in range(int(8000 * seconds)))


def ffmpeg(out, data, *args):
    head = ["ffmpeg", "-v", "error", "-y", "-bitexact"]
    subprocess.run(head + list(args) + ["-fflags", "+bitexact", "-map_metadata", "-1", out], input=data, check=True)


def main(root):
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "%dx%d" % (W, H), "-r", "20", "-i", "-"]
    h264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "30", "-bf", "2", "-crf", "34", "-preset", "veryslow", "-threads", "1"]
    video = frames()
    at = lambda name: os.path.join(root, name)
    ffmpeg(at("numbers.mp4"), video, *raw, *h264, "-movflags", "+faststart")
    ffmpeg(at("numbers.h264"), video[:W * H * 3 * 40], *raw, *h264)
    ffmpeg(at("numbers.avi"), video[:W * H * 3 * 40], *raw, "-c:v", "mpeg4", "-g", "8", "-q:v", "20", "-bf", "0")
    ffmpeg(at("numbers.mkv"), video, *raw, *h264)
    tone = ["-f", "s16le", "-ar", "8000", "-ac", "1", "-i", "-"]
    ffmpeg(at("sound.mka"), sound(0.3), *tone, "-c:a", "pcm_u8")
    turned = ["-i", at("numbers.mp4"), "-c", "copy", "-metadata:s:v:0", "rotate=90", "-frames:v", "4"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-bitexact", *turned, at("turned.mp4")], check=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
