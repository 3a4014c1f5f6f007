#!/usr/bin/env python3
"""score.py - metrics of the question sets and of the generated tasks.

  score.py --data ../data/*.jsonl.xz --pred run.jsonl [--base fullkv.jsonl] [--by task|len|depth] [--json]

Predictions: JSONL, one {"id": ..., "prediction": "..."} per sample; for metric `nll` {"id": ..., "nll": mean
negative log-likelihood per token of answers[0]}.  Samples without a prediction are left out and counted.
--base adds a paired comparison (retention = score/base score, wins, losses, exact sign test).

Metrics (field `metric` of the sample)
  contains      1 if any answer is a substring of the prediction (after normalising)
  word          as contains, but the answer must stand as a whole identifier/word
  number        as contains, on numbers: no digit may stand next to the match
  recall        share of answers that are contained (multi-value tasks)
  exact         1 if the normalised prediction equals an answer
  qa            best token F1 over answers, 1.0 when an answer is contained in a short prediction
  f1            best token F1 over answers
  mc            first option letter in the prediction equals the answer
  prefix_words  share of the gold words that the prediction gives in order from the start
  edit_sim      1 - edit distance / longer length, first non-empty line, fences removed
  rouge_l       best ROUGE-L F over the references
  nll           mean negative log-likelihood (lower is better; reported, not averaged with the others)

SPDX-License-Identifier: Apache-2.0
"""
import argparse, collections, glob, gzip, json, lzma, math, random, re, string, sys

ARTICLES = {"a", "an", "the"}
NUMBER = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())}


def open_any(path):
    if path.endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8")
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def read_jsonl(paths):
    for pat in paths:
        for path in sorted(glob.glob(pat)) or [pat]:
            with open_any(path) as f:
                for line in f:
                    if line.strip():
                        yield json.loads(line)


def norm(s):
    s = s.lower().replace("\u2019", "'").replace("\u2013", "-").replace("\u2014", "-")
    s = "".join(c if c not in string.punctuation else " " for c in s)
    return " ".join(NUMBER.get(w, w) for w in s.split() if w not in ARTICLES)


def toks(s):
    return norm(s).split()


def clean(pred):
    """Cut what chat models add after the answer."""
    for stop in ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "</s>"):
        pred = pred.split(stop)[0]
    return pred.strip()


def m_contains(p, answers):
    n = " %s " % norm(p)
    compact = re.sub(r"\s+", "", n)
    for a in answers:
        x = norm(a)
        if not x:
            continue
        if len(x) <= 4:  # short answers must stand alone
            if " %s " % x in n:
                return 1.0
        elif x in n or (len(x) > 5 and x.replace(" ", "") in compact):
            return 1.0
    return 0.0


def m_word(p, answers):
    return float(any(re.search(r"(?<!\w)%s(?!\w)" % re.escape(a), p) for a in answers))


def m_number(p, answers):
    p = p.replace(",", "")
    return float(any(re.search(r"(?<![\d.])%s(?![\d]|\.\d)" % re.escape(a.replace(",", "")), p) for a in answers))


def m_recall(p, answers):
    return sum(m_contains(p, [a]) for a in answers) / len(answers)


def m_exact(p, answers):
    return float(any(norm(p) == norm(a) for a in answers))


def f1(p, a):
    x, y = toks(p), toks(a)
    if not x or not y:
        return float(x == y)
    same = sum((collections.Counter(x) & collections.Counter(y)).values())
    if not same:
        return 0.0
    pr, rc = same / len(x), same / len(y)
    return 2 * pr * rc / (pr + rc)


def m_f1(p, answers):
    return max(f1(p, a) for a in answers)


def m_qa(p, answers):
    p1 = p.strip().split("\n")[0]
    if all(norm(a) in ("yes", "no") for a in answers):
        return float(toks(p1)[:1] in [toks(a) for a in answers])
    best = max(m_f1(p, answers), m_f1(p1, answers))
    short = max(len(toks(a)) for a in answers)
    for a in answers:
        x = norm(a)
        if x and re.search(r"(?<!\w)%s(?!\w)" % re.escape(x), norm(p1)) and len(toks(p1)) <= 15 + 2 * short:
            return 1.0
    return best


def m_mc(p, answers):
    m = re.search(r"(?:answer|option|choice)\s*(?:is|:)?\s*\(?\**([A-D])\b", p, re.I) or \
        re.match(r"\s*[\(\[\*]*([A-D])(?![A-Za-z'])", p) or re.search(r"(?<![A-Za-z'])([A-D])(?=[\).:\s]|$)", p)
    return float(bool(m) and m.group(1).upper() in answers)


def m_prefix_words(p, answers):
    best = 0.0
    for a in answers:
        g, x = toks(a), toks(p)
        for off in range(0, min(17, max(1, len(x)))):  # the model may repeat the given beginning first
            n = 0
            while n < len(g) and off + n < len(x) and g[n] == x[off + n]:
                n += 1
            best = max(best, n / len(g))
    return best


def lev(a, b):
    if len(a) < len(b):
        a, b = b, a
    prev = list(range(len(b) + 1))
    for i, ca in enumerate(a, 1):
        cur = [i]
        for j, cb in enumerate(b, 1):
            cur.append(min(prev[j] + 1, cur[-1] + 1, prev[j - 1] + (ca != cb)))
        prev = cur
    return prev[-1]


def m_edit_sim(p, answers):
    lines = [l for l in p.split("\n") if l.strip() and not l.strip().startswith("```")]
    x = lines[0].strip() if lines else ""
    return max(1 - lev(x, a.strip()) / max(1, len(x), len(a.strip())) for a in answers)


def m_rouge_l(p, answers):
    x, best = toks(p), 0.0
    for a in answers:
        y = toks(a)
        if not x or not y:
            continue
        row = [0] * (len(y) + 1)
        for w in x:
            diag = 0
            for j, v in enumerate(y, 1):
                diag, row[j] = row[j], (diag + 1 if w == v else max(row[j], row[j - 1]))
        l = row[-1]
        if l:
            pr, rc = l / len(x), l / len(y)
            best = max(best, 2 * pr * rc / (pr + rc))
    return best


METRICS = {k[2:]: v for k, v in list(globals().items()) if k.startswith("m_")}


def score_one(sample, pred):
    if sample["metric"] == "nll":
        return pred.get("nll")
    return METRICS[sample["metric"]](clean(str(pred.get("prediction", ""))), sample["answers"])


def group_of(s, by):
    if by == "len":
        t = s.get("n_tokens") or s.get("est_tokens") or len(s["context"]) // 4
        for lim in (1500, 3000, 6000, 12000, 24000, 48000, 96000):
            if t <= lim:
                return "<=%d" % lim
        return ">96000"
    if by == "depth":
        d = s.get("depth")
        return "none" if d is None else "%.1f-%.1f" % (min(4, int(d * 5)) / 5, min(4, int(d * 5)) / 5 + 0.2)
    return s["task"] if by == "task" else str(s.get(by))


def boot(v, n=1000):
    r = random.Random(0)
    ms = sorted(sum(r.choice(v) for _ in v) / len(v) for _ in range(n))
    return ms[int(0.025 * n)], ms[int(0.975 * n) - 1]


def sign_test(w, l):
    n = w + l
    if not n:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(0, min(w, l) + 1)) / 2 ** n)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", nargs="+", required=True)
    ap.add_argument("--pred", required=True)
    ap.add_argument("--base")
    ap.add_argument("--ids", help="file with one sample id per line: score only these")
    ap.add_argument("--by", default="task", help="task, len, depth or any field of the samples")
    ap.add_argument("--json", action="store_true")
    a = ap.parse_args()
    ids = None
    if a.ids:
        with open(a.ids) as f:
            ids = {l.split()[0] for l in f if l.strip() and not l.startswith("#")}
    pred = {p["id"]: p for p in read_jsonl([a.pred])}
    base = {p["id"]: p for p in read_jsonl([a.base])} if a.base else {}
    S, B, N = (collections.defaultdict(list) for _ in range(3))
    missing = 0
    for s in read_jsonl(a.data):
        if ids is not None and s["id"] not in ids:
            continue
        if s["id"] not in pred:
            missing += 1
            continue
        v = score_one(s, pred[s["id"]])
        if v is None:
            missing += 1
            continue
        g = group_of(s, a.by)
        if s["metric"] == "nll":
            N[g].append((v, score_one(s, base[s["id"]]) if s["id"] in base else None))
            continue
        S[g].append(v)
        if s["id"] in base:
            B[g].append((v, score_one(s, base[s["id"]])))
    out = {"missing": missing, "groups": {}, "nll": {}}
    for g in sorted(S):
        lo, hi = boot(S[g])
        e = {"n": len(S[g]), "score": sum(S[g]) / len(S[g]), "ci95": [lo, hi]}
        if B[g]:
            bs = sum(y for _, y in B[g]) / len(B[g])
            e.update(base=bs, retention=(sum(x for x, _ in B[g]) / len(B[g]) / bs) if bs else None,
                     wins=sum(x > y + 1e-9 for x, y in B[g]), losses=sum(y > x + 1e-9 for x, y in B[g]))
        out["groups"][g] = e
    flat = [v for g in S for v in S[g]]
    pairs = [p for g in B for p in B[g]]
    if flat:
        lo, hi = boot(flat)
        e = {"n": len(flat), "score": sum(flat) / len(flat), "ci95": [lo, hi],
             "macro": sum(x["score"] for x in out["groups"].values()) / len(out["groups"])}
        if pairs:
            w, l = sum(x > y + 1e-9 for x, y in pairs), sum(y > x + 1e-9 for x, y in pairs)
            bs = sum(y for _, y in pairs) / len(pairs)
            e.update(base=bs, retention=(sum(x for x, _ in pairs) / len(pairs) / bs) if bs else None, wins=w,
                     losses=l, sign_p=sign_test(w, l))
        out["all"] = e
    for g in sorted(N):
        v = [x for x, _ in N[g]]
        b = [(x, y) for x, y in N[g] if y is not None]
        e = {"n": len(v), "nll": sum(v) / len(v), "ppl": math.exp(sum(v) / len(v))}
        if b:
            e["delta_nll"] = sum(x - y for x, y in b) / len(b)
        out["nll"][g] = e
    if a.json:
        print(json.dumps(out, indent=1))
        return
    fmt = "%-20s %5s %7s  %-15s %7s %7s %5s %5s"
    print(fmt % (a.by, "n", "score", "95% CI", "base", "retain", "win", "loss"))
    for g, e in list(out["groups"].items()) + ([("ALL", out["all"])] if flat else []):
        num = lambda k: "%.3f" % e[k] if e.get(k) is not None else "-"
        print(fmt % (g, e["n"], num("score"), "[%.3f, %.3f]" % tuple(e["ci95"]), num("base"), num("retention"),
                     e.get("wins", "-"), e.get("losses", "-")))
    for g, e in out["nll"].items():
        print("%-20s n=%d nll %.4f ppl %.3f%s" % (g, e["n"], e["nll"], e["ppl"],
                                                  "  delta %.4f" % e["delta_nll"] if "delta_nll" in e else ""))
    if missing:
        print("no prediction for %d samples" % missing)


if __name__ == "__main__":
    main()
