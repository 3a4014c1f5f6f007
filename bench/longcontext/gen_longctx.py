#!/usr/bin/env python3
"""gen_longctx.py - deterministic long-context tasks (Python stdlib only, no tokenizer needed).

Every sample depends only on (--seed, task, target length, index, depth, haystack files, templates).
Output: JSONL in the common schema
  {id, task, context, question, answers[], choices?, metric, source, license,
   max_new_tokens, est_tokens, target_tokens, depth?, needles?}

Examples
  gen_longctx.py --tasks passkey,niah_multikey,kv --tokens 2048,4096 -n 4 --seed 7 \\
                 --haystack ../haystack/*.txt -o out.jsonl
  gen_longctx.py --tasks niah_single --tokens 16384 --depths 0,0.25,0.5,0.75,1 -n 1 -o grid.jsonl

Length: est_tokens() approximates the Qwen2.5 byte-level BPE from character classes (each digit is one
token there).  Checked against the real tokenizer on this generator's output: real/target 0.90 .. 1.04.

SPDX-License-Identifier: Apache-2.0
"""
import argparse, glob, gzip, hashlib, json, os, random, re, sys, uuid

# ---------------------------------------------------------------- token estimate
_TOK = re.compile(r"[^\W\d_]+|[ \t]?\d+|[\r\n]+|(?:[^\w\s]|_)+[\r\n]*|[ \t]{2,}")


def est_tokens(text):
    n = 0.0
    for m in _TOK.finditer(text):
        w = m.group()
        c = w[0]
        if c.isalpha():
            n += 1.0 if len(w) <= 8 else 1.0 + (len(w) - 8) / 5.0
        elif c.isdigit() or (c in " \t" and w[-1].isdigit()):
            n += len(w)
        else:
            n += 1.0 if len(w) < 4 else len(w) / 3.0
    return int(n * 1.035 + 0.5)


# ---------------------------------------------------------------- words
ADJ = ("amber brisk candid dusty eager frosty gentle hollow ivory jagged keen lunar mellow nimble opal placid quiet "
       "rustic silver tidy umber vivid woven young zesty ancient bitter copper distant empty fabled golden humble "
       "idle jolly kindly little modest narrow olive purple royal scarlet tender upper velvet winter yellow").split()
NOUN = ("anchor beacon cradle dagger easel falcon garnet harbor inkwell jacket kettle lantern magnet needle orchard "
        "pillow quiver ribbon saddle tunnel urchin violin walnut yarrow zephyr acorn barrel candle drawer engine "
        "feather goblet hammer island jungle kernel ladder mirror napkin oyster pebble quarry rocket shovel temple "
        "umbrella valley window whistle").split()
PEOPLE = "Abel Bruna Cyril Dora Edwin Freya Gustav Hilda Igor Joan Konrad Leona Magnus Nadia Otto Petra".split()
PLACES = ["the bakery", "the cellar", "the chapel", "the dockyard", "the foundry", "the greenhouse", "the library",
          "the mill", "the orchard", "the post office", "the stable", "the town hall"]
OBJECTS = ["the brass compass", "the blue notebook", "the silver whistle", "the wooden flute", "the sealed letter",
           "the copper kettle", "the torn map", "the ivory comb"]

DEFAULT_TEMPLATES = {
    "passkey_intro": "Somewhere in the following text there is an important pass key. Find it and remember it.",
    "passkey_needle": "The pass key is {v}. Remember it. {v} is the pass key.",
    "passkey_question": "What is the pass key? Answer with the number only.",
    "filler": ["The river runs past the mill.", "Clouds drift over the hill.", "The lamp is lit at dusk.",
               "A cart rolls down the lane and back again."],
    "niah_needle": "The registered access code for {k} is {v}.",
    "niah_question": "According to the text, what is the registered access code for {k}? Answer with the code only.",
    "multivalue_question": "According to the text, what are all the registered access codes for {k}? "
                           "List every code, separated by commas.",
    "multiquery_question": "According to the text, what are the registered access codes for {ks}? "
                           "Answer with the codes in that order, separated by commas.",
    "update_needle": "From now on the meeting room for team {k} is room {v}.",
    "update_question": "The meeting room of team {k} was changed several times in the text. What is the last room "
                       "it was changed to? Answer with the room number only.",
    "number_intro": "Below is a long stream of text. One long digit string is hidden in it. Remember that string.",
    "number_needle": "The digit string is {v}. Keep {v} in mind.",
    "number_question": "What was the digit string? Answer with the digits only.",
    "kv_intro": "Below is a JSON object that maps keys to values.",
    "kv_question": "In the JSON object above, what is the value for the key \"{k}\"? Answer with the value only.",
    "line_needle": "line {k}: REGISTER = <{v}>",
    "line_intro": "Below is a numbered log. Each line has a name and a register value in angle brackets.",
    "line_question": "What is the REGISTER value in line {k}? Answer with the number only.",
    "vt_question": "Follow the assignments in the text above. What number does the variable {k} hold? "
                   "Answer with the number only.",
    "vt_names_question": "Follow the assignments in the text above. Which variables hold the value {v}? "
                         "List every such variable name, separated by commas.",
    "where_question": "Where is {k} now? Answer with the place only.",
    "quote_question": "One sentence of the text above begins with these words: \"{k}\" "
                      "Continue that sentence exactly as it stands in the text.",
    "cwe_intro": "Below is a list of words. Some words occur much more often than the others.",
    "cwe_question": "Which {n} words occur most often in the list above? Answer with the words only, "
                    "separated by commas.",
}


def rng_for(*parts):
    h = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).digest()
    return random.Random(int.from_bytes(h[:8], "big"))


def open_text(path):
    with (gzip.open(path, "rt", encoding="utf-8", errors="replace") if path.endswith(".gz") else
          open(path, encoding="utf-8", errors="replace")) as file:
        return file.read()


class Haystack:
    """Sentences (or whole paragraphs) of plain text files, cut at a seeded start point."""

    def __init__(self, texts):
        self.docs = []
        for f, text in sorted(texts):
            units = []
            for para in text.split("\n\n"):
                para = para.strip()
                if not para:
                    continue
                sents = re.split(r"(?<=[.!?][\"')\]])\s+|(?<=[.!?])\s+(?=[\"'(]?[A-Z])", para)
                sents = [s for s in sents if s]
                for i, s in enumerate(sents):
                    units.append((s, "\n\n" if i == len(sents) - 1 else " "))
            costs = [est_tokens(u) + (1 if sep != " " else 0) for u, sep in units]
            self.docs.append((os.path.basename(f), units, costs, sum(costs)))
        self.total = sum(d[3] for d in self.docs)

    def cut(self, rng, budget):
        """A run of units worth about `budget` tokens; wraps over the documents when one is too short."""
        if not self.docs:
            raise SystemExit("this task needs --haystack FILES")
        order = list(range(len(self.docs)))
        rng.shuffle(order)
        order.sort(key=lambda i: self.docs[i][3] < budget)  # long enough ones first, still shuffled
        out, left, names = [], budget, []
        first = True
        while left > 0:
            for di in order:
                name, units, costs, tot = self.docs[di]
                start = 0
                if first and tot > left:  # random paragraph start that leaves room
                    run, ok = tot, []
                    for i, c in enumerate(costs):
                        if run < left:
                            break
                        if i == 0 or units[i - 1][1] != " ":
                            ok.append(i)
                        run -= c
                    start = rng.choice(ok) if ok else 0
                first = False
                names.append(name)
                for i in range(start, len(units)):
                    if left <= 0:
                        break
                    out.append(units[i])
                    left -= costs[i]
                if left <= 0:
                    break
        return out, names


def join(units):
    return "".join(u + sep for u, sep in units).strip()


def insert(units, needles, depths):
    """Insert each needle sentence at a fraction of the units; order of equal depths is kept."""
    n = len(units)
    spots = sorted(((min(n, int(round(d * n))), i) for i, d in enumerate(depths)), reverse=True)
    units = list(units)
    for pos, i in spots:
        prev_sep = units[pos - 1][1] if pos else " "
        if pos and prev_sep != " ":  # stay inside the paragraph layout
            units[pos - 1] = (units[pos - 1][0], " ")
            units.insert(pos, (needles[i], prev_sep))
        else:
            units.insert(pos, (needles[i], " "))
    return units


def key(rng, used):
    while True:
        k = "the %s %s" % (rng.choice(ADJ), rng.choice(NOUN))
        if k not in used:
            used.add(k)
            return k


def digits(rng, n):
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(n - 1))


def spread(rng, k, first=None):
    d = [(i + rng.random()) / k for i in range(k)]
    if first is not None:
        d[0] = first
    return d


class Gen:
    def __init__(self, hay, tpl, a):
        self.h, self.t, self.a = hay, tpl, a

    def budget(self, target, *fixed):
        return max(64, target - self.a.overhead - sum(est_tokens(x) for x in fixed))

    def book(self, rng, target, needles, depths, *fixed):
        units, names = self.h.cut(rng, self.budget(target, " ".join(needles), *fixed))
        return join(insert(units, needles, depths)), names

    # each task: (rng, target, depth) -> dict(context, question, answers, metric, max_new_tokens, ...)
    def passkey(self, rng, target, depth):
        t, v = self.t, digits(rng, 5)
        needle, intro, q = t["passkey_needle"].format(v=v), t["passkey_intro"], t["passkey_question"]
        left, out, i = self.budget(target, needle, intro, q), [], 0
        cost = [est_tokens(s) for s in t["filler"]]
        while left > 0:
            j = i % len(cost)
            out.append((t["filler"][j], " " if j < len(cost) - 1 else "\n"))
            left -= cost[j]
            i += 1
        ctx = intro + "\n\n" + join(insert(out, [needle], [depth]))
        return dict(context=ctx, question=q, answers=[v], metric="contains", max_new_tokens=12)

    def passkey_book(self, rng, target, depth):
        t, v = self.t, digits(rng, 5)
        needle, q = t["passkey_needle"].format(v=v), t["passkey_question"]
        ctx, names = self.book(rng, target, [needle], [depth], q)
        return dict(context=ctx, question=q, answers=[v], metric="contains", max_new_tokens=12, haystack=names)

    def number_string(self, rng, target, depth):
        t, v = self.t, "".join(c * rng.randint(1, 3) for c in digits(rng, 6))[:12]
        needle, q = t["number_needle"].format(v=v), t["number_question"]
        ctx, names = self.book(rng, target, [needle], [depth], q, t["number_intro"])
        return dict(context=t["number_intro"] + "\n\n" + ctx, question=q, answers=[v], metric="contains",
                    max_new_tokens=24, haystack=names)

    def niah_single(self, rng, target, depth):
        t, k, v = self.t, key(rng, set()), digits(rng, 7)
        needle, q = t["niah_needle"].format(k=k, v=v), t["niah_question"].format(k=k)
        ctx, names = self.book(rng, target, [needle], [depth], q)
        return dict(context=ctx, question=q, answers=[v], metric="contains", max_new_tokens=16, needles=[needle],
                    haystack=names)

    def niah_multikey(self, rng, target, depth):
        t, used = self.t, set()
        kv = [(key(rng, used), digits(rng, 7)) for _ in range(self.a.keys)]
        needles = [t["niah_needle"].format(k=k, v=v) for k, v in kv]
        q = t["niah_question"].format(k=kv[0][0])
        ctx, names = self.book(rng, target, needles, spread(rng, len(kv), depth), q)
        return dict(context=ctx, question=q, answers=[kv[0][1]], metric="contains", max_new_tokens=16,
                    needles=needles[:1], haystack=names)

    def niah_multivalue(self, rng, target, depth):
        t, used = self.t, set()
        k = key(rng, used)
        vals = [digits(rng, 6) for _ in range(self.a.values)]
        other = [(key(rng, used), digits(rng, 6)) for _ in range(2)]
        needles = [t["niah_needle"].format(k=k, v=v) for v in vals] + \
                  [t["niah_needle"].format(k=x, v=y) for x, y in other]
        q = t["multivalue_question"].format(k=k)
        d = spread(rng, len(needles))
        rng.shuffle(d)
        ctx, names = self.book(rng, target, needles, d, q)
        return dict(context=ctx, question=q, answers=vals, metric="recall", max_new_tokens=16 * len(vals),
                    haystack=names)

    def niah_multiquery(self, rng, target, depth):
        t, used = self.t, set()
        kv = [(key(rng, used), digits(rng, 6)) for _ in range(self.a.queries + 2)]
        ask = kv[:self.a.queries]
        needles = [t["niah_needle"].format(k=k, v=v) for k, v in kv]
        q = t["multiquery_question"].format(ks=", ".join(k for k, _ in ask[:-1]) + " and " + ask[-1][0])
        d = spread(rng, len(needles))
        rng.shuffle(d)
        ctx, names = self.book(rng, target, needles, d, q)
        return dict(context=ctx, question=q, answers=[v for _, v in ask], metric="recall",
                    max_new_tokens=16 * len(ask), haystack=names)

    def update(self, rng, target, depth):
        """Same key set several times: the last value counts (does the memory keep order?)."""
        t = self.t
        teams = rng.sample(["Alder", "Birch", "Cedar", "Doum", "Elm", "Fir"], 2)
        vals = rng.sample(range(100, 1000), 5)
        needles = [t["update_needle"].format(k=teams[0], v=v) for v in vals[:3]]
        needles += [t["update_needle"].format(k=teams[1], v=v) for v in vals[3:]]
        d = sorted(rng.random() * max(0.05, depth) for _ in range(2)) + [max(0.06, depth)] + \
            [rng.random(), rng.random()]
        q = t["update_question"].format(k=teams[0])
        ctx, names = self.book(rng, target, needles, d, q)
        return dict(context=ctx, question=q, answers=[str(vals[2])], metric="contains", max_new_tokens=12,
                    haystack=names)

    def kv(self, rng, target, depth):
        t = self.t
        mk = (lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))) if self.a.uuid else \
             (lambda: "%08x" % rng.getrandbits(32))
        q0 = t["kv_question"].format(k=mk())
        left, items, seen = self.budget(target, t["kv_intro"], q0), [], set()
        while left > 0:
            k, v = mk(), mk()
            if k in seen:
                continue
            seen.add(k)
            items.append((k, v))
            left -= est_tokens('"%s": "%s",\n' % (k, v))
        i = min(len(items) - 1, int(round(depth * (len(items) - 1))))
        body = "{" + ",\n ".join('"%s": "%s"' % kv for kv in items) + "}"
        return dict(context=t["kv_intro"] + "\n\n" + body, question=t["kv_question"].format(k=items[i][0]),
                    answers=[items[i][1]], metric="contains", max_new_tokens=48 if self.a.uuid else 16,
                    n_items=len(items))

    def lines(self, rng, target, depth):
        t, used = self.t, set()
        left, items = self.budget(target, t["line_intro"], t["line_question"]), []
        while left > 0:
            k = "%s-%s" % (rng.choice(ADJ), rng.choice(NOUN))
            if k in used:
                k = "%s-%d" % (k, len(items))
            used.add(k)
            v = digits(rng, 5)
            items.append((k, v))
            left -= est_tokens(t["line_needle"].format(k=k, v=v) + "\n")
        i = min(len(items) - 1, int(round(depth * (len(items) - 1))))
        body = "\n".join(t["line_needle"].format(k=k, v=v) for k, v in items)
        return dict(context=t["line_intro"] + "\n\n" + body, question=t["line_question"].format(k=items[i][0]),
                    answers=[items[i][1]], metric="contains", max_new_tokens=12, n_items=len(items))

    def _chains(self, rng, hops, chains):
        names, used = [], set()
        for _ in range(chains):
            c = []
            while len(c) <= hops:
                n = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(4))
                if n not in used:
                    used.add(n)
                    c.append(n)
            names.append(c)
        vals = [digits(rng, 5) for _ in range(chains)]
        return names, vals

    def vt(self, rng, target, depth, names_q=False):
        """Variable tracking: value of the last variable of one chain (or every name with a value)."""
        chains, vals = self._chains(rng, self.a.hops, 2)
        needles, depths = [], []
        for c, v in zip(chains, vals):
            d = sorted(rng.random() for _ in c)
            for j, n in enumerate(c):
                needles.append("VAR %s = %s." % (n, v if j == 0 else "VAR " + c[j - 1]))
                depths.append(d[j])
        if names_q:
            q, ans, metric, mx = self.t["vt_names_question"].format(v=vals[0]), chains[0], "recall", 48
        else:
            q, ans, metric, mx = self.t["vt_question"].format(k=chains[0][-1]), [vals[0]], "contains", 12
        ctx, names = self.book(rng, target, needles, depths, q)
        return dict(context=ctx, question=q, answers=ans, metric=metric, max_new_tokens=mx, haystack=names)

    def vt_names(self, rng, target, depth):
        return self.vt(rng, target, depth, True)

    def where(self, rng, target, depth):
        """Two supporting facts spread in a book: who took the object, where that person went last."""
        who, other = rng.sample(PEOPLE, 2)
        obj, obj2 = rng.sample(OBJECTS, 2)
        pl = rng.sample(PLACES, 5)
        facts = ["%s went to %s." % (who, pl[0]), "%s went to %s." % (other, pl[1]),
                 "%s picked up %s there." % (who, obj), "%s picked up %s there." % (other, obj2),
                 "%s went to %s and stayed there." % (other, pl[2]),
                 "%s, still carrying %s, went to %s and stayed there." % (who, obj, pl[3])]
        d = sorted(rng.random() for _ in facts)
        q = self.t["where_question"].format(k=obj)
        ctx, names = self.book(rng, target, facts, d, q)
        return dict(context=ctx, question=q, answers=[pl[3], pl[3].replace("the ", "", 1)], metric="contains",
                    max_new_tokens=16, haystack=names)

    def quote(self, rng, target, depth):
        """No planted needle: continue a sentence that really stands in the text (gold is verbatim)."""
        q0 = self.t["quote_question"]
        units, names = self.h.cut(rng, self.budget(target, q0) - 24)
        ctx = join(units)
        cand = [i for i, (u, _) in enumerate(units) if 18 <= len(u.split()) <= 45 and "\n" not in u]
        cand.sort(key=lambda i: abs(i / max(1, len(units) - 1) - depth))
        for i in cand:
            w = units[i][0].split()
            head, tail = " ".join(w[:8]), " ".join(w[8:20])
            if ctx.count(head) == 1 and '"' not in head:
                return dict(context=ctx, question=q0.format(k=head), answers=[tail], metric="prefix_words",
                            max_new_tokens=28, haystack=names)
        raise ValueError("no sentence fit")

    def cwe(self, rng, target, depth):
        t, n = self.t, 3
        words = ["%s" % w for w in dict.fromkeys(ADJ + NOUN)]
        rng.shuffle(words)
        top, rest = words[:n], words[n:]
        left, out = self.budget(target, t["cwe_intro"], t["cwe_question"]), []
        total = int(left / 2.35)
        for w in top:
            out += [w] * max(6, int(total * 0.16))
        i = 0
        while len(out) < total:
            out.append(rest[i % len(rest)])
            i += 1
        rng.shuffle(out)
        body = ", ".join(out)
        return dict(context=t["cwe_intro"] + "\n\n" + body, question=t["cwe_question"].format(n=n), answers=top,
                    metric="recall", max_new_tokens=24)


TASKS = [m for m in dir(Gen) if not m.startswith("_") and m not in ("book", "budget")]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", default="passkey,niah_single,niah_multikey,kv,vt", help="any of: " + ",".join(TASKS))
    p.add_argument("--tokens", default="2048,4096,8192", help="target lengths in tokens (prompt without chat frame)")
    p.add_argument("-n", type=int, default=5, help="samples per task and length (per depth with --depths)")
    p.add_argument("--depths", default="", help="comma list of needle depths 0..1; default: seeded random")
    p.add_argument("--seed", default="1")
    p.add_argument("--haystack", nargs="*", default=[], help="plain text files (UTF-8)")
    p.add_argument("--templates", help="JSON file overriding any of the built-in wordings")
    p.add_argument("--keys", type=int, default=8, help="needles in niah_multikey")
    p.add_argument("--values", type=int, default=3, help="values in niah_multivalue")
    p.add_argument("--queries", type=int, default=2, help="keys asked for in niah_multiquery")
    p.add_argument("--hops", type=int, default=2, help="assignments after the first in vt")
    p.add_argument("--uuid", action="store_true", help="36-character UUIDs in kv instead of 8 hex digits")
    p.add_argument("--overhead", type=int, default=32, help="tokens kept free for the chat frame")
    p.add_argument("--license", default="CC0-1.0 (generated); haystack: public domain")
    p.add_argument("-o", "--out", default="-")
    a = p.parse_args()
    tpl = dict(DEFAULT_TEMPLATES)
    if a.templates:
        with open(a.templates, encoding="utf-8") as f:
            tpl.update(json.load(f))
    texts = [(g, open_text(g)) for f in a.haystack for g in (glob.glob(f) or [f])]
    gen = Gen(Haystack(texts), tpl, a)
    out = sys.stdout if a.out == "-" else open(a.out, "w", encoding="utf-8")
    depths = [float(x) for x in a.depths.split(",")] if a.depths else [None]
    for task in a.tasks.split(","):
        if task not in TASKS:
            raise SystemExit("unknown task %s; known: %s" % (task, ", ".join(TASKS)))
        for target in (int(x) for x in a.tokens.split(",")):
            for dep in depths:
                for i in range(a.n):
                    rng = rng_for(a.seed, task, target, dep, i)
                    d = rng.random() if dep is None else dep
                    s = getattr(gen, task)(rng, target, d)
                    tag = "" if dep is None else "-d%03d" % round(dep * 100)
                    row = {"id": "%s-%d%s-%s-%02d" % (task, target, tag, a.seed, i), "task": task}
                    row.update(s)
                    row.update(source="gen_longctx.py", license=a.license, target_tokens=target, depth=round(d, 3),
                               est_tokens=est_tokens(row["context"] + "\n\n" + row["question"]))
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    if out is not sys.stdout:
        out.close()


if __name__ == "__main__":
    main()
