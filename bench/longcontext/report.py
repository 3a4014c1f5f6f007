"""report.py - the tables of OUT.jsonl.

Of a case that was answered more than once the last answer counts. A share of full attention is taken
over the cases that both have answered.

SPDX-License-Identifier: Apache-2.0
"""
import collections
import random
import statistics

import score


def mean(values):
    return sum(values) / len(values) if values else None


def size(n):
    return "-" if n is None else "%dM" % (n >> 20) if n >= 1 << 20 else "%dK" % (n >> 10) if n >= 1024 else str(n)


def latest(rows):
    found = {}
    for r in rows:
        key = (r["model"], r["variant"], r["id"], r.get("asked"))
        if "error" not in r or key not in found:
            found[key] = r
    return list(found.values())


def markdown(head, lines):
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(str(c) for c in line) + " |" for line in lines] + [""]


class Table:
    """Scores of one model: by group (task and length, or set), variant and case."""

    def __init__(self, rows, group, value=lambda r: r["score"]):
        self.cells = collections.defaultdict(dict)
        self.variants, self.groups = [], []
        for r in rows:
            if r["variant"] not in self.variants:
                self.variants.append(r["variant"])
            if group(r) not in self.groups:
                self.groups.append(group(r))
            self.cells[group(r), r["variant"]][r["id"]] = value(r)

    def pairs(self, group, variant):
        full = self.cells.get((group, "full"), {})
        return [(s, full[i]) for i, s in self.cells[group, variant].items() if i in full]

    def cell(self, group, variant, n):
        mine = self.cells.get((group, variant), {})
        if not mine:
            return "-"
        text = "%.3f" % mean(list(mine.values()))
        pairs = self.pairs(group, variant)
        base = mean([f for _, f in pairs])
        if variant != "full" and base:
            text += " (%.0f %%)" % (100 * mean([s for s, _ in pairs]) / base)
        return text if len(mine) == n else text + ", n=%d" % len(mine)


def generated_table(rows):
    table = Table(rows, lambda r: (r["task"], r["length"]))
    lines = []
    for group in sorted(table.groups):
        n = max(len(table.cells.get((group, v), {})) for v in table.variants)
        lines.append([group[0], size(group[1]), n] + [table.cell(group, v, n) for v in table.variants])
    return markdown(["task", "tokens", "n"] + table.variants, lines)


def depth_table(rows):
    """Where in the text answers are missed."""
    cells = collections.defaultdict(list)
    for r in rows:
        if r.get("depth") is not None:
            cells[r["variant"], r["length"], min(4, int(r["depth"] * 5))].append(r["score"])
    lines = []
    for variant, length in sorted({k[:2] for k in cells}):
        marks = [cells.get((variant, length, b)) for b in range(5)]
        lines.append([variant, size(length)] + ["%.2f" % mean(m) if m else "-" for m in marks])
    return markdown(["variant", "tokens", "0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"], lines)


def likelihood_table(rows):
    """How likely the right answer was. Differences are to the first variant, over the cases that both have."""
    table = Table(rows, lambda r: (r["set"] or r["task"], r["length"]), lambda r: r)
    base, lines = "full" if "full" in table.variants else table.variants[0], []
    for group in table.groups:
        for variant in table.variants:
            mine = table.cells.get((group, variant), {})
            if not mine:
                continue
            line = [group[0], size(group[1]), variant, len(mine)] + [
                "%.2f" % mean([r[k] for r in mine.values()]) for k in ("logprob", "logprob_first")]
            line.append("%d of %d" % (sum(r["n_first_choice"] == r["n_expected"] for r in mine.values()), len(mine)))
            other = table.cells.get((group, base), {})
            pairs = [(r["logprob"], other[i]["logprob"]) for i, r in mine.items() if i in other]
            lines.append(line + ["" if variant == base or not pairs else "%+.2f (%+.2f .. %+.2f)" % (
                (mean([a - b for a, b in pairs]),) + interval(pairs))])
    return markdown(["task", "tokens", "variant", "n", "log-probability", "of the first token", "would be written",
                     "less %s, 95 %%" % base], lines)


def interval(pairs, n=1000):
    """95 % of the mean difference of pairs, by resampling cases."""
    rng = random.Random(0)
    means = sorted(mean([a - b for a, b in (rng.choice(pairs) for _ in pairs)]) for _ in range(n))
    return means[int(0.025 * n)], means[int(0.975 * n) - 1]


def set_table(rows):
    table, lines = Table(rows, lambda r: r["set"]), []
    for group in table.groups:
        for variant in table.variants:
            mine = list(table.cells.get((group, variant), {}).values())
            if not mine:
                continue
            line, pairs = [group, variant, len(mine), "%.3f" % mean(mine)], table.pairs(group, variant)
            if variant == "full" or not pairs:
                lines.append(line + [""] * 5)
                continue
            wins = sum(s > f + 1e-9 for s, f in pairs)
            losses = sum(f > s + 1e-9 for s, f in pairs)
            base = mean([f for _, f in pairs])
            lines.append(line + ["%.3f" % base,
                                 "%.1f %%" % (100 * mean([s for s, _ in pairs]) / base) if base else "-",
                                 "%+.3f .. %+.3f" % interval(pairs), "%d / %d" % (wins, losses),
                                 "%.2f" % score.sign_test(wins, losses)])
    return markdown(["set", "variant", "n", "score", "full, same cases", "share", "difference, 95 %", "better / worse",
                     "p"], lines)


def time_table(rows):
    """Reading and answering as they came along; on a machine that did other things too, a lower bound."""
    groups = collections.defaultdict(list)
    for r in rows:
        groups[r["length"] or 0, r["variant"], r["stored"]].append(r)
    lines = []
    for (length, variant, stored), found in sorted(groups.items()):
        # A context is read once for several questions, and only what the store did not have.
        reads = {(r["n_read"], r["read_s"]) for r in found if r.get("n_read")}
        seconds = sum(s for _, s in reads)
        right = [r for r in found if r["score"] >= 1]
        lines.append([size(length) if length else "sets", variant, "store" if stored else "memory",
                      "%.0f" % (sum(n for n, _ in reads) / seconds) if seconds else "-",
                      "%.2f" % (statistics.median(r["ttft_ms"] for r in found) / 1e3) if stored else "-",
                      "%.1f" % statistics.median(r["decode_tps"] for r in found),
                      "%d of %d" % (sum(0 < r.get("cited", 0) <= 3 for r in right), len(right)) if stored else "-"])
    return markdown(["tokens", "variant", "from", "read tokens/s", "first token s", "write tokens/s",
                     "right answers that cite it"], lines)


def preamble(rows):
    lines = ["# Answers from long texts", ""]
    for machine, threads in sorted({(r["machine"], r["threads"]) for r in rows}):
        lines.append("%s, %d threads." % (machine, threads))
    commits = collections.Counter(r["commit"] for r in rows)
    lines.append("Commits: %s." % ", ".join("%s (%d answers)" % c for c in commits.most_common()))
    lines += ["", "Greedy answers of bench/longcontext/run.py, one line each in the file .jsonl beside:", ""]
    lines += ["    " + c for c in sorted({r["command"] for r in rows})] + [""]
    specs = {(r["variant"], r["spec"], r["ingest"]) for r in rows}
    return lines + markdown(["variant", "--policy", "read with"],
                            [[v, "`%s`" % s, "the same" if i == s else "`%s`" % i] for v, s, i in sorted(specs)])


def tables(rows):
    if not rows:
        return "# Answers from long texts\n\nNothing measured.\n"
    rows, lines = latest(rows), preamble(rows)
    errors = [r for r in rows if "error" in r]
    rows = [r for r in rows if "error" not in r]
    for model in sorted({r["model"] for r in rows}):
        mine = [r for r in rows if r["model"] == model and "score" in r]
        likely = [r for r in rows if r["model"] == model and "logprob" in r]
        made, sets = [r for r in mine if not r["set"]], [r for r in mine if r["set"]]
        lines += ["## " + model, ""]
        if made:
            lines += ["Share of questions answered; in brackets the share of full attention's score.", ""]
            lines += generated_table(made) + ["By the place of the answer in the text, all tasks:", ""]
            lines += depth_table(made)
        if sets:
            lines += ["Question sets, paired with full attention:", ""] + set_table(sets)
        if likely:
            lines += ["Log-probability (natural) of the right answer, its tokens read as if they had been written:", ""]
            lines += likelihood_table(likely)
        if mine:
            lines += ["Along the way:", ""] + time_table(mine)
    if errors:
        kinds = collections.Counter((r["variant"], size(r["length"]), r["error"]) for r in errors)
        lines += ["## Not answered", ""]
        lines += ["- %s, %s, %d: %s" % (v, n, k, e) for (v, n, e), k in kinds.most_common()] + [""]
    return "\n".join(lines)
