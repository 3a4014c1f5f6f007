"""stats.py - medians, intervals, fits: all arithmetic of the report, on plain lists of numbers.

The rule that matters most: a ratio of two engines is made of pairs that ran in turn, and of fewer than
MIN_PAIRS pairs there is none. Resampling uses a fixed seed, so the same results give the same page.

Sources: percentile bootstrap (Efron 1979, "Bootstrap Methods", sec. 2); power laws by least squares in the
logarithms; Pareto front by sorting.

SPDX-License-Identifier: Apache-2.0
"""
import math
import random
import statistics

MIN_PAIRS = 3
MIN_QUESTIONS = 8  # an interval of fewer scores is drawn from too little to call a difference real
RESAMPLES = 1000


def mean(values):
    return sum(values) / len(values) if values else None


def bootstrap(items, figure, resamples=RESAMPLES):
    """95 % interval of figure(items), by drawing items with replacement; None for an empty list.

    figure may return None for a draw that it cannot be made of (a share of zero); such draws are left out."""
    if not items:
        return None
    rng = random.Random(0)
    drawn = [figure(rng.choices(items, k=len(items))) for _ in range(resamples)]
    drawn = sorted(d for d in drawn if d is not None)
    if not drawn:
        return None
    return drawn[int(0.025 * len(drawn))], drawn[max(0, math.ceil(0.975 * len(drawn)) - 1)]


def mean_interval(values):
    """(mean, low, high)."""
    if not values:
        return None
    return (mean(values),) + bootstrap(values, mean)


def share(pairs):
    """Sum of the first over sum of the second of the pairs; None where the second has nothing."""
    base = sum(b for _, b in pairs)
    return sum(a for a, _ in pairs) / base if base else None


def share_interval(pairs):
    """(share, low, high) of paired scores, None from fewer than MIN_PAIRS or of a base without score."""
    if len(pairs) < MIN_PAIRS or share(pairs) is None:
        return None
    return (share(pairs),) + bootstrap(pairs, share)


def spread(values):
    """(median, least, most)."""
    return (statistics.median(values), min(values), max(values)) if values else None


def ratio(pairs):
    """(median of a / b, least, most, pairs), None from fewer than MIN_PAIRS: one noisy minute is no result."""
    good = [a / b for a, b in pairs if a is not None and b]
    if len(good) < MIN_PAIRS:
        return None
    return spread(good) + (len(good),)


class Fit:
    """value = factor * n^exponent; error: standard deviation of the logarithms about the line."""

    def __init__(self, factor, exponent, error, n, least, most):
        self.factor, self.exponent, self.error, self.n = factor, exponent, error, n
        self.least, self.most = least, most

    def at(self, x):
        return self.factor * x ** self.exponent

    def __str__(self):
        return "n^%.2f" % self.exponent


def power_fit(points):
    """Least squares of log y on log x; None with fewer than 3 different x: two points fit any line."""
    points = [(x, y) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in points}) < 3:
        return None
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mx, my = mean(xs), mean(ys)
    b = sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)
    a = my - b * mx
    left = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys))
    error = math.sqrt(left / max(1, len(points) - 2))
    return Fit(math.exp(a), b, error, len(points), min(x for x, _ in points), max(x for x, _ in points))


class Line:
    """value = base + slope * n; error: root mean square of the relative errors."""

    def __init__(self, base, slope, error, n, least, most):
        self.base, self.slope, self.error, self.n = base, slope, error, n
        self.least, self.most = least, most

    def at(self, x):
        return self.base + self.slope * x

    def __str__(self):
        return "a + b n"


def line_fit(points):
    """Fixed cost and cost a token, both at least 0, least squares of the relative errors; None with fewer than 3
    different x."""
    points = [(x, y) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in points}) < 3:
        return None
    # y = a + b x, each row over y: 1 = a / y + b x / y.
    u, v = [1 / y for _, y in points], [x / y for x, y in points]
    uu, uv, vv = (sum(p * q for p, q in zip(*two)) for two in ((u, u), (u, v), (v, v)))
    det = uu * vv - uv * uv
    a, b = (vv * sum(u) - uv * sum(v)) / det, (uu * sum(v) - uv * sum(u)) / det
    if a < 0:
        a, b = 0.0, sum(v) / vv
    if b < 0:
        a, b = sum(u) / uu, 0.0
    error = math.sqrt(sum((a * p + b * q - 1) ** 2 for p, q in zip(u, v)) / len(points))
    return Line(a, b, error, len(points), min(x for x, _ in points), max(x for x, _ in points))


def pareto(points):
    """Names of the points (name, cost, score) that no other beats in one and equals in the other."""
    front = []
    for name, cost, score in points:
        if not any(c <= cost and s >= score and (c < cost or s > score) for _, c, s in points):
            front.append(name)
    return front


def moved(old, new, better, least=0.05):
    """'better', 'worse' or None: the intervals (value, low, high) are apart, and by more than `least`.

    better: 'high' or 'low', what is good for this figure. Touching intervals are noise."""
    (v0, low0, high0), (v1, low1, high1) = old, new
    if not (low1 > high0 or high1 < low0):
        return None
    scale = max(abs(v0), 1e-12)
    if abs(v1 - v0) / scale <= least:
        return None
    return "better" if (v1 > v0) == (better == "high") else "worse"
