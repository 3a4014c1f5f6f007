/* npy.h - NumPy's array files, .npy versions 1 to 3.
 *
 * Layout (numpy.lib.format): 0x93 "NUMPY", major, minor, length of the header (2 bytes little-endian in
 * version 1, 4 in 2 and 3), the header - a Python dictionary literal with the keys descr, fortran_order and
 * shape - padded with blanks to a multiple of 64, then the elements.
 *
 * Rule: the header is somebody else's text. It is parsed as exactly that dictionary, nothing is evaluated,
 * and the shape must agree with the size of the file before a byte of data is touched.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_NPY_H
#define KVFOLD_TOOLS_NPY_H

#include "array.h"
#include "outfile.h"

/* Most bytes of a header: NumPy's own limit is 10,000, and a shape of 8 dimensions needs 300. */
#define NPY_MAX_HEADER 65536

/* Read the header of a file of file_bytes bytes, of which bytes[0..n) are the first (all of the header, or
 * as many as NPY_MAX_HEADER + 12). Errors: FORMAT (not .npy, damaged, cut off); UNSUPPORTED (structured or
 * text elements, Fortran order with more than one dimension, too many dimensions). */
kvf_status npy_parse(array_info *out, const char *name, const void *bytes, size_t n, int64_t file_bytes,
                     kvf_error *err);

/* Open a file and read its header. Errors: those, IO, ARG, NOMEM. */
kvf_status npy_open(array_file *f, array_info *out, const char *path, kvf_error *err);

/* Write version 1, little-endian. info gives type, n_dim and shape; data may be written in pieces:
 * npy_begin, outfile_write of the elements in order, outfile_commit. */
kvf_status npy_begin(outfile *o, const char *path, const array_info *info, kvf_error *err);

/* A whole array at once. */
kvf_status npy_write(const char *path, const array_info *info, const void *data, kvf_error *err);

#endif
