"""scale.py - cost against length, fitted and carried on to 10M tokens, and many readers of one store.

Two laws are fitted to each cost: a power of the length (what the picture shows as a straight line), and a fixed cost
plus a cost a token, which is what reading with a budget should be. The rule that matters most: measured and
extrapolated figures never look alike, and where the two laws disagree both are printed.

SPDX-License-Identifier: Apache-2.0
"""
import statistics

import engines as eng
import figures
import plots
import stats
import words

FAR_AWAY = 10 * (1 << 20)
LONGEST = 1 << 20
FROM = eng.FAR  # no law of shorter texts alone is carried on: fixed costs hide what grows
# field: (title, label of the axis, unit, the same cost in the files of bench/speed_long.py)
FIELDS = {"read_s": ("reading", "s", "s", ("read", "read, to be asked")),
          "restart_s": ("new process to first token", "s", "s", ("first",)),
          "step_ms": ("writing, a token", "ms", "ms", ("decode step",)),
          "peak_bytes": ("peak memory", "bytes", "bytes", ("peak memory, reading",)),
          "disk_bytes": ("on disk", "bytes", "bytes", ("store on disk",)),
          "n_computed": ("tokens computed", "tokens", "tokens", ())}
BOUNDED = ("peak_bytes",)  # by --memory, from some length on: a law through both sides of it is none for what follows
ONE_SETTING = ("full", "lazyllm", "lazyllm-fast", "llama.cpp", "llama.cpp+slot")
TELLING = 0.5  # of a power's error; and its exponent, if it is to say what comes far away: less is that of fixed costs


def value_of(row, field):
    if field == "read_s":
        return row["n_tokens"] / row["read_tps"] if row.get("read_tps") else None
    if field == "step_ms":
        return 1e3 / row["write_tps"] if row.get("write_tps") else None
    return row.get(field)


def of_long_runs(sources, model, field):
    """(tokens, value) of infllm as it is by default, from the newest run of bench/speed_long.py at each length."""
    names, out = FIELDS[field][3], {}
    for f in (f for s in sources if s.bench == "speed_long" and s.here for f in s.figures):
        if f["model"] == model and f["engine"] == "infllm" and f["figure"] in names:
            n = int(f["row"])
            out[n] = n / f["value"] if field == "read_s" else f["value"]
    return sorted(out.items())


def points(rows, sources, model, engine, field):
    """[(tokens, median)] with one setting: no law goes through a change of the budget."""
    values = {}
    for r in figures.costs_of(rows, model):
        if r["engine"] == engine and value_of(r, field):
            values.setdefault(r["n_tokens"], []).append(value_of(r, field))
    longer = of_long_runs(sources, model, field) if engine == "infllm" else []
    for n, value in longer:
        values.setdefault(n, []).append(value)
    found = sorted((n, statistics.median(v)) for n, v in values.items())
    if engine in ONE_SETTING:
        return found
    far = [p for p in found if p[0] >= eng.FAR]
    return far if longer or len(far) >= 3 else [p for p in found if p[0] < eng.FAR]


def laws_of(found):
    """(power, line) of points; None twice with fewer than 3 lengths."""
    return stats.power_fit(found), stats.line_fit(found)


def is_telling(power):
    return power.exponent >= TELLING and power.error <= TELLING


def goes_on(engine):
    """Full attention and what reads a whole text stop at the trained length."""
    return engine.startswith(("infllm", "rag-"))


def fits(model, rows, sources=()):
    out = []
    for field in FIELDS:
        for name in figures.names_in(figures.costs_of(rows, model)):
            power, line = laws_of(points(rows, sources, model, name, field))
            if not power:
                continue

            def add(figure, value, unit=""):
                out.append(figures.figure(model, "fit", field, name, figure, value, power.n, "", unit))
            add("longest measured", power.most, "tokens")
            add("exponent", power.exponent)
            add("error of the logarithm", power.error)
            add("fixed", line.base, FIELDS[field][2])
            add("a thousand tokens", 1e3 * line.slope, FIELDS[field][2])
            add("error of the line", line.error)
            for n in (LONGEST, FAR_AWAY) if goes_on(name) and power.most >= FROM and field not in BOUNDED else []:
                if n > power.most and is_telling(power):
                    add("at %d, by the power" % n, power.at(n), FIELDS[field][2])
                if n > power.most and line.error <= TELLING:
                    add("at %d, by the line" % n, line.at(n), FIELDS[field][2])
    return out


def everything(rows, sources=()):
    """All figures of the rows, the laws among them."""
    return figures.everything(rows) + [f for model in figures.models_of(rows) for f in fits(model, rows, sources)]


# ---- The chapter ----

def far_cell(found, model, field, name, n):
    by = [words.get(found, model, "fit", field, name, "at %d, by the %s" % (n, law)) for law in ("power", "line")]
    texts = words.unique(words.with_unit(f) for f in by if f)
    if texts:
        return " or ".join(texts)
    most = words.get(found, model, "fit", field, name, "longest measured")["value"]
    return "beyond the model" if not goes_on(name) else "bounded by --memory" if field in BOUNDED and name == "infllm" else "measured" if most >= n else "no law"


SHOWN = ("full", "infllm", "rag-bm25", "llama.cpp", "llama.cpp+slot")


def law_table(found, model, shown):
    lines = []
    for field, (title, _, _, _) in FIELDS.items():
        for name in [n for n in eng.NAMES if (n in SHOWN) == shown and words.get(found, model, "fit", field, n, "exponent")]:
            of = {w: words.get(found, model, "fit", field, name, w) for w in (
                "exponent", "error of the logarithm", "longest measured", "fixed", "a thousand tokens", "error of the line")}
            lines.append([title, name, of["exponent"]["n"], plots.size(of["longest measured"]["value"]),
                          "n^%.2f" % of["exponent"]["value"], "%.2f" % of["error of the logarithm"]["value"],
                          "%s + %s" % (words.with_unit(of["fixed"]), words.with_unit(of["a thousand tokens"])),
                          "%.0f %%" % (100 * of["error of the line"]["value"])] +
                         [far_cell(found, model, field, name, n) for n in (LONGEST, FAR_AWAY)])
    return ("table", ["cost", "engine", "lengths", "up to", "power", "scatter (log)", "fixed + a thousand tokens", "error",
                      "1M tokens", "10M tokens"], lines)


def pictures(rows, model, sources):
    out = []
    for field, (title, label, _, _) in FIELDS.items():
        laws = {}
        for name in figures.names_in(figures.costs_of(rows, model)):
            measured = points(rows, sources, model, name, field)
            power, line = laws_of(measured)
            if power:
                carried = goes_on(name) and power.most >= FROM and field not in BOUNDED
                laws[name] = (measured, power if is_telling(power) or line.error > power.error else line, FAR_AWAY if carried else 0)
        out.append(plots.laws(title[0].upper() + title[1:], laws, "tokens of the text", label, max([FAR_AWAY] * any(end for _, _, end in laws.values()) + [p[0] for m, _, _ in laws.values() for p in m],
                                  default=0)))
    return [p for p in out if p]


def index_words(sources, model):
    """The index is what memory must hold beside the budget."""
    index = {int(f["row"]): f["value"] for s in sources if s.bench == "speed_long" and s.here for f in s.figures
             if f["figure"] == "index" and f["model"] == model}
    if not index:
        return []
    most = max(index)
    each = index[most] / most
    return ["the index %s (%.0f bytes a token at %s), beside the budget for keys and values (`--memory`, 1G) in memory or "
            "mapped" % (words.quantity({"value": each * FAR_AWAY, "unit": "bytes"}), each, plots.size(most))]


def far_words(found, model, sources):
    """What 10M tokens would cost, in one sentence, or what is lacking for it."""
    said = []
    for field, text in (("read_s", "reading takes %s"), ("disk_bytes", "the store %s on disk"),
                        ("restart_s", "a new process has its first token after %s"), ("step_ms", "each token more takes %s")):
        values = []
        for law in ("power", "line"):
            f = words.get(found, model, "fit", field, "infllm", "at %d, by the %s" % (FAR_AWAY, law))
            if f:
                hours = f["unit"] == "s" and f["value"] > 3600
                values.append(("%.1f hours" % (f["value"] / 3600) if hours else words.with_unit(f)) + " by the " + law)
        said += [text % " or ".join(values)] if values else []
    if not said:
        return []
    said += index_words(sources, model)
    most = max(f["value"] for f in words.of(found, model, "fit") if f["engine"] == "infllm" and f["figure"] == "longest measured")
    return [("p", "**10M tokens with `infllm`, extrapolated, not measured: %s.** The longest text behind these laws has %s tokens; "
             "they hold if nothing new sets in beyond it, such as a store that no longer fits into the page cache (each "
             "question then reads its blocks from the disk) or an index that no longer fits into memory." % (
                 "; ".join(said), plots.size(most)))]


def chapter(rows, found, model, sources):
    out = [("p", "**No fit**: it needs three lengths.")]
    if words.of(found, model, "fit"):
        out = [("p", "Two laws for each cost, fitted to the medians by length: a power of the length (least squares of the "
                "logarithms), and a fixed cost plus a cost a token (least squares of the relative errors). For engines with a "
                "budget only lengths with the same budget; for `infllm` with its defaults the runs of `bench/speed_long.py` "
                "(other commits and hours, see Other measurements) are among the points. **1M and 10M tokens are extrapolated "
                "unless it says measured**; by both laws where both fit. \"No law\": a power below n^%g is that of fixed costs, "
                "a scatter or error above %g that of a busy hour, and texts below 8K alone say nothing of what comes far away. Engines that read the whole text at once stop at the trained "
                "length." % (TELLING, TELLING)), law_table(found, model, True), ("more", "The other engines", [law_table(found, model, False)]),
               ("svg", pictures(rows, model, sources)),
               ("p", "Dots are measured, solid lines the law through them (the power where it is telling, else fixed plus a token), "
                "dotted lines extrapolated, for those that can go there.")]
        out += far_words(found, model, sources)
    return out + reader_table(found, model)


def reader_table(found, model):
    head = [("h", 3, "One store, many readers")]
    mine = words.of(found, model, "readers")
    if not mine:
        return head + [("p", "**Not run.**")]
    lines = []
    for row in sorted({f["row"] for f in mine}, key=lambda r: tuple(int(w) for w in r.split(" x "))):
        of = {f["figure"]: f for f in mine if f["row"] == row}
        n_tokens, n_readers = (int(w) for w in row.split(" x "))
        lines.append([plots.size(n_tokens), n_readers, of["first_s"]["n"]] +
                     [words.with_unit(of.get(k)) for k in ("first_s", "slowest_s", "all_tps", "rss_bytes", "pss_bytes",
                                                           "all_pss_bytes")] +
                     ["%.0f %%" % (100 * of[k]["low"]) for k in ("same", "correct")])
    return head + [
        ("p", "Processes that ask one store at the same moment, each the same question about a stored text with a pass key in it, "
         "33 tokens each; the machine's threads are divided among them, one each at least. First token: from the start of a "
         "process, median of the processes, and the slowest; tokens/s: of all, from the first start to the last end. Resident "
         "memory counts shared pages in every process, proportional memory (PSS) counts a page that k processes share as 1/k: "
         "their sum is what the machine gives. Same: answers equal to the letter to those of one reader alone; correct: with "
         "the pass key; both in the worst round. Medians over the rounds."),
        ("table", ["tokens", "readers", "rounds", "first token", "slowest", "all together", "resident, each", "PSS, each",
                   "PSS, all", "same", "correct"], lines)]
