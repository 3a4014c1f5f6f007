#!/usr/bin/env python3
"""Writes two-pages.pdf: a minimal PDF 1.4 (ISO 32000) with text on pages 1 and 3, none on page 2.

  make_pdf.py > two-pages.pdf

SPDX-License-Identifier: Apache-2.0"""
import sys

TEXTS = ["The first page says hello.", "", "The third page ends it."]

objects = [b"<< /Type /Catalog /Pages 2 0 R >>",
           b"<< /Type /Pages /Kids [4 0 R 6 0 R 8 0 R] /Count 3 >>",
           b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
for i, text in enumerate(TEXTS):
    objects.append(b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents %d 0 R "
                   b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * i))
    stream = b"BT /F1 14 Tf 20 150 Td (%s) Tj ET" % text.encode() if text else b""
    objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
objects.append(b"<< /Title (A small PDF) >>")

out = b"%PDF-1.4\n"
offsets = []
for number, body in enumerate(objects, 1):
    offsets.append(len(out))
    out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
xref = len(out)
out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
out += b"".join(b"%010d 00000 n \n" % o for o in offsets)
out += b"trailer\n<< /Size %d /Root 1 0 R /Info %d 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
    len(objects) + 1, len(objects), xref)
sys.stdout.buffer.write(out)
