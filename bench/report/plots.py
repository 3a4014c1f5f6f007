"""plots.py - pictures as SVG text: lines, points with names, heat maps. Nothing but strings.

Colours belong to engines, not to the order in which they come, so that every picture of a page agrees.

SPDX-License-Identifier: Apache-2.0
"""
import html
import math

COLOURS = {"full": "#1b1b1b", "window": "#999999", "snapkv": "#a6761d", "keydiff": "#66a61e", "lazyllm": "#7570b3",
           "lazyllm-fast": "#b3a2e0", "infllm": "#0072b2", "infllm-paper": "#56b4e9", "infllm+lazyllm": "#009e73", "rag-bm25": "#d55e00",
           "rag-minilm": "#e69f00", "rag-bm25+lazyllm": "#cc79a7", "llama.cpp": "#c0392b", "llama.cpp+slot": "#e8a39c"}
DASHED = {"llama.cpp", "llama.cpp+slot", "rag-bm25", "rag-minilm", "rag-bm25+lazyllm"}
SPARE = ["#117733", "#882255", "#44aa99", "#999933"]
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 30, 46


def colour(name):
    return COLOURS.get(name) or SPARE[sum(name.encode()) % len(SPARE)]


def size(n):
    if n >= 1 << 20:
        return "%gM" % (n / (1 << 20))
    return "%gK" % (n / 1024) if n >= 1024 else "%g" % n


def number(v):
    """A figure at an axis: few digits, thousands and smaller units short."""
    if v == 0:
        return "0"
    if abs(v) >= 1e9:
        return "%.3gG" % (v / 1e9)
    if abs(v) >= 1e6:
        return "%.3gM" % (v / 1e6)
    if abs(v) >= 1e3:
        return "%.3gk" % (v / 1e3)
    return "%.3g" % v


def text(x, y, words, anchor="middle", extra=""):
    return '<text x="%.1f" y="%.1f" text-anchor="%s"%s>%s</text>' % (x, y, anchor, extra, html.escape(str(words)))


def nice_steps(low, high, n=5):
    """Round figures between low and high."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / n))
    step *= next((m for m in (1, 2, 5, 10) if span / (step * m) <= n + 1), 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


class Axis:
    """Values to pixels, straight or by logarithm; marks: the values that are named at the axis."""

    def __init__(self, values, log=False, marks=None, zero=False, room=0.05):
        low, high = min(values), max(values)
        self.log = log
        if log:
            low, high = math.log(low), math.log(high)
        elif zero:
            low = min(0.0, low)
        pad = (high - low) * room or abs(high) * 0.1 or 1.0
        self.low, self.high = (low if zero and not log else low - pad), high + pad
        if marks is None and log:
            a, b = math.exp(self.low), math.exp(self.high)
            marks = [m * 10.0 ** e for e in range(math.floor(math.log10(a)), math.ceil(math.log10(b)) + 1)
                     for m in (1, 2, 5) if a <= m * 10.0 ** e <= b]
            if len(marks) > 7:
                tens = [m for m in marks if abs(math.log10(m) - round(math.log10(m))) < 1e-9]
                marks = tens if len(tens) >= 3 else marks[::2]
            if len(marks) < 3:
                marks = nice_steps(a, b, 4)
        self.marks = marks if marks is not None else nice_steps(self.low, self.high)

    def place(self, value, start, end):
        v = math.log(value) if self.log else value
        return start + (v - self.low) / (self.high - self.low) * (end - start)


class Frame:
    """An empty picture with two axes; things are added in data units."""

    def __init__(self, title, xlabel, ylabel, x, y, xname=number, width=470, height=310, legend=(), dashed=True):
        self.x, self.y, self.width, self.height = x, y, width, height
        rows = math.ceil(len(legend) / 3)
        self.total = height + 16 * rows
        self.parts = [text(width / 2, 16, title, extra=' class="t"')]
        for m in x.marks:
            at = self.px(m)
            self.parts.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" class="g"/>' % (at, TOP, at, height - BOTTOM))
            self.parts.append(text(at, height - BOTTOM + 14, xname(m)))
        for m in y.marks:
            at = self.py(m)
            self.parts.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" class="g"/>' % (LEFT, at, width - RIGHT, at))
            self.parts.append(text(LEFT - 6, at + 4, number(m), "end"))
        self.parts.append(text((LEFT + width - RIGHT) / 2, height - 12, xlabel))
        mid = (TOP + height - BOTTOM) / 2
        self.parts.append(text(14, mid, ylabel, extra=' transform="rotate(-90 14 %.1f)"' % mid))
        for i, (name, label) in enumerate(legend):
            left, top = LEFT - 50 + (i % 3) * (width - 14) / 3, height + 8 + 16 * (i // 3)
            self.parts.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="3"%s/>' % (
                left, top - 4, left + 16, top - 4, colour(name), ' stroke-dasharray="5 3"' if dashed and name in DASHED else ""))
            self.parts.append(text(left + 20, top, label, "start"))

    def px(self, v):
        return self.x.place(v, LEFT, self.width - RIGHT)

    def py(self, v):
        return self.y.place(v, self.height - BOTTOM, TOP)

    def line(self, name, points, extra=""):
        at = " ".join("%.1f,%.1f" % (self.px(a), self.py(b)) for a, b in points)
        dash = ' stroke-dasharray="5 3"' if name in DASHED else ""
        self.parts.append('<polyline points="%s" fill="none" stroke="%s" stroke-width="1.8"%s/>' % (
            at, colour(name), extra or dash))

    def dot(self, name, a, b, low=None, high=None, radius=3.2, hint=""):
        x, y = self.px(a), self.py(b)
        if low is not None and high > low:
            self.parts.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-opacity="0.55"/>' % (
                x, self.py(low), x, self.py(high), colour(name)))
        self.parts.append('<circle cx="%.1f" cy="%.1f" r="%g" fill="%s"><title>%s</title></circle>' % (
            x, y, radius, colour(name), html.escape(hint or "%s: %s" % (name, number(b)))))

    def svg(self):
        return wrap(self.width, self.total, self.parts)


def wrap(width, height, parts):
    return '<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img">%s</svg>' % (
        width, height, width, height, "".join(parts))


def lines(title, series, xlabel, ylabel, log_y=True):
    """series: name -> [(tokens, value, low, high)]. '' without points."""
    series = {k: sorted(v) for k, v in series.items() if v}
    flat = [p for v in series.values() for p in v]
    if not flat:
        return ""
    xs = sorted({p[0] for p in flat})
    ys = [v for p in flat for v in (p[1], p[2], p[3])]
    if log_y and min(ys) <= 0:
        log_y = False
    marks = xs if len(xs) <= 9 else xs[::2]
    x, y = Axis(xs, True, marks), Axis(ys, log_y, zero=not log_y)
    frame = Frame(title, xlabel, ylabel, x, y, size, legend=[(n, n) for n in series])
    for name, points in series.items():
        frame.line(name, [(p[0], p[1]) for p in points])
        for p in points:
            frame.dot(name, *p, hint="%s at %s: %s (%s to %s)" % (name, size(p[0]), number(p[1]), number(p[2]), number(p[3])))
    return frame.svg()


def laws(title, laws_of, xlabel, ylabel, far):
    """laws_of: name -> (points, law, how far it is carried on). Measured points, the fitted law solid through them and
    dotted from there on; far: where the axis ends."""
    if not laws_of:
        return ""
    xs = [p[0] for points, _, _ in laws_of.values() for p in points]
    ys = [p[1] for points, _, _ in laws_of.values() for p in points] + [fit.at(end) for _, fit, end in laws_of.values() if end]
    marks = [4 ** k * 1024 for k in range(12) if min(xs) <= 4 ** k * 1024 <= far]
    frame = Frame(title, xlabel, ylabel, Axis(xs + [far], True, marks), Axis(ys, True), size, width=620, dashed=False,
                  legend=[(n, "%s: %s" % (n, fit)) for n, (_, fit, _) in laws_of.items()])
    for name, (points, fit, end) in laws_of.items():
        least, most = min(p[0] for p in points), max(p[0] for p in points)
        frame.line(name, [(least, fit.at(least)), (most, fit.at(most))], ' stroke-dasharray="none"')
        if end > most:
            frame.line(name, [(most, fit.at(most)), (end, fit.at(end))], ' stroke-dasharray="1 4"')
        for p in points:
            frame.dot(name, p[0], p[1])
    return frame.svg()


def scatter(title, points, xlabel, ylabel, front, log_x=True):
    """points: [(name, x, y, low, high)]; names beside the points, pushed apart; the front is joined."""
    if not points:
        return ""
    xs, ys = [p[1] for p in points], [v for p in points for v in p[2:5]]
    frame = Frame(title, xlabel, ylabel, Axis(xs, log_x, room=0.14), Axis(ys, zero=True), width=560, height=360)
    chosen = sorted((p for p in points if p[0] in front), key=lambda p: p[1])
    if len(chosen) > 1:
        frame.line("full", [(p[1], p[2]) for p in chosen], ' stroke-dasharray="2 3" stroke-opacity="0.6"')
    taken = []
    for name, x, y, low, high in sorted(points, key=lambda p: -p[2]):
        frame.dot(name, x, y, low, high, 5 if name in front else 3.5)
        left, top = frame.px(x), frame.py(y)
        right = left > frame.width * 0.72
        at = top + 4
        while any(abs(at - t) < 12 and abs(left - l) < 110 for l, t in taken):
            at += 12
        taken.append((left, at))
        frame.parts.append(text(left + (-8 if right else 8), at, name, "end" if right else "start",
                                ' fill="%s" font-weight="%s"' % (colour(name), "bold" if name in front else "normal")))
    return frame.svg()


def shade(v):
    """0..1: from red over pale yellow to green; legible with black figures on it."""
    stops = [(0.0, (222, 120, 104)), (0.5, (250, 234, 170)), (1.0, (122, 190, 132))]
    for (a, ca), (b, cb) in zip(stops, stops[1:]):
        if v <= b:
            t = (v - a) / (b - a)
            return "#%02x%02x%02x" % tuple(round(p + (q - p) * t) for p, q in zip(ca, cb))
    return "#7abe84"


def heat(title, cells, lengths, depths):
    """cells: (depth, length) -> (score, n); what was not run stays empty."""
    wide, high, left, top = 46, 26, 52, 30
    width = max(left + wide * len(lengths) + 8, 12 + 7 * len(title), 170)
    height = top + high * len(depths) + 36
    parts = [text(width / 2, 16, title, extra=' class="t"')]
    for j, d in enumerate(depths):
        parts.append(text(left - 6, top + high * (j + 0.5) + 4, d, "end"))
        for i, n in enumerate(lengths):
            x, y, cell = left + wide * i, top + high * j, cells.get((d, n))
            parts.append('<rect x="%d" y="%d" width="%d" height="%d" fill="%s" stroke="#fff"/>' % (
                x, y, wide, high, shade(cell[0]) if cell else "#eeeeee"))
            if cell:
                parts.append(text(x + wide / 2, y + high / 2 + 4, "%.2f" % cell[0], extra=' fill="#222"'))
    for i, n in enumerate(lengths):
        parts.append(text(left + wide * (i + 0.5), top + high * len(depths) + 14, size(n)))
    parts.append(text(left + wide * len(lengths) / 2, height - 6, "tokens"))
    return wrap(width, height, parts)
