#!/usr/bin/env python3
# make_resized.py [OUT_DIR] - what Pillow makes of small pictures; needs Pillow and NumPy.
#
# resized_<fit>_<filter>_<width>x<height>_<size>.npy: [size][size][3] u8. The picture is picture() below, which
# tests/unit/test_video.c repeats in C.
#
# SPDX-License-Identifier: Apache-2.0
import os
import sys

import numpy as np
from PIL import Image

CASES = [("stretch", "bicubic", 50, 31, 24), ("stretch", "bicubic", 11, 7, 24), ("stretch", "bilinear", 50, 31, 24),
         ("crop", "bicubic", 61, 40, 24), ("crop", "bicubic", 24, 33, 24), ("stretch", "bicubic", 24, 90, 24)]


def picture(w, h):
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    return np.stack([x * 37 % 256, (x * y * 11 + y) % 256, np.where((x // 3 + y // 2) % 2 == 1, 255, 0)], -1).astype(np.uint8)


def main(root):
    for fit, name, w, h, size in CASES:
        im = Image.fromarray(picture(w, h))
        how = Image.BICUBIC if name == "bicubic" else Image.BILINEAR
        tw, th = size, size
        if fit == "crop":
            tw, th = (size * w // h, size) if w > h else (size, size * h // w)
        im = im.resize((tw, th), how)
        left, top = (tw - size) // 2, (th - size) // 2
        im = im.crop((left, top, left + size, top + size))
        np.save(os.path.join(root, "resized_%s_%s_%dx%d_%d.npy" % (fit, name, w, h, size)), np.asarray(im))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
