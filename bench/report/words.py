"""words.py - figures found by name, and written as words: a score with its interval, a cost with its unit.

SPDX-License-Identifier: Apache-2.0
"""


def get(found, model, section, row, engine, name):
    for f in found:
        if (f["model"], f["section"], f["row"], f["engine"], f["figure"]) == (model, section, row, engine, name):
            return f
    return None


def of(found, model, section):
    return [f for f in found if f["model"] == model and f["section"] == section]


def unique(values):
    return list(dict.fromkeys(values))


def score(f):
    if not f:
        return ""
    return "%.2f" % f["value"] if f["low"] is None else "%.2f (%.2f-%.2f)" % (f["value"], f["low"], f["high"])


def times(f):
    if not f:
        return ""
    form = "%.3fx (%.3f-%.3f)" if f["value"] < 0.1 else "%.2fx (%.2f-%.2f)"
    return form % (f["value"], f["low"], f["high"])


def quantity(f):
    """A cost with its unit, short."""
    if not f:
        return ""
    v, unit = f["value"], f["unit"]
    if unit == "bytes":
        return "%.1f GB" % (v / 1e9) if v >= 1e10 else "%.0f MB" % (v / 1e6) if v >= 1e6 else "%.0f kB" % (v / 1e3) if v else "0"
    if unit == "s":
        return ("%.3f s" if v < 1 else "%.2f s" if v < 100 else "%.0f s") % v
    return "%.3g" % v if v < 1000 else "%.0f" % v


def with_spread(f):
    if not f or f["low"] is None or f["n"] < 2 or f["high"] - f["low"] <= 0.005 * abs(f["value"]):
        return quantity(f)
    low, high = (quantity(dict(f, value=f[k])).split(" ")[0] for k in ("low", "high"))
    return "%s (%s%s%s)" % (quantity(f), low, " to " if f["low"] < 0 else "-", high)


def with_unit(f):
    """As with_spread, the unit named where quantity does not."""
    text = with_spread(f)
    if not text or f["unit"] in ("", "bytes", "s"):
        return text
    value, _, spread = text.partition(" ")
    return value + ("x" if f["unit"] == "x" else " " + f["unit"]) + (" " + spread if spread else "")
