"""contexts.py - texts with hidden facts, and the questions about them.

One context serves as many questions as its task allows: a table of keys or a book with eight named
codes is read once and asked eight times. Where a context can hold one fact only (a pass key), the
contexts of a sample differ in nothing but the fact and its place, so a store that shares what begins
alike reads the text between two depths once.

Deterministic: a context depends on task, length, sample, seed and the books, on nothing else. Lengths
are in tokens of the model at hand: `count` measures, and the filler is cut until it fits.

SPDX-License-Identifier: Apache-2.0
"""
import glob
import os

import gen_longctx as gen
import score

FRAME = 96  # tokens kept free for the chat frame, the question and its repetition
N_ASK = 8   # questions of a context that has room for many


class Question:
    def __init__(self, ident, text, answers, depth=None, metric="contains", max_tokens=16):
        self.ident, self.text, self.answers = ident, text, answers
        self.depth, self.metric, self.max_tokens = depth, metric, max_tokens

    def score(self, prediction):
        return score.METRICS[self.metric](score.clean(prediction), self.answers)


class Context:
    """A text and its questions. Contexts of one group begin alike or are the same text."""

    def __init__(self, ident, text, questions, task, length, group=None):
        self.ident, self.text, self.questions = ident, text, questions
        self.task, self.length, self.group = task, length, group or ident
        self.subset, self.raw, self.n_tokens = None, False, 0


# ---- What the facts are hidden in ---------------------------------------------------------

def made_up_book(n_sentences=60000):
    """Sentences of the generator's own words, for machines without a book."""
    rng = gen.rng_for("book")
    frames = ["%s walked from %s to %s and found %s there.", "At dusk %s left %s for %s, still looking for %s.",
              "Nobody in the village knew why %s went past %s to %s with %s."]
    lines = []
    for i in range(n_sentences):
        a, b = rng.sample(gen.PLACES, 2)
        lines.append(rng.choice(frames) % (rng.choice(gen.PEOPLE), a, b, rng.choice(gen.OBJECTS)) +
                     " It was a %s day for a %s." % (rng.choice(gen.ADJ), rng.choice(gen.NOUN)))
        if i % 6 == 5:
            lines.append("\n\n")
    return " ".join(lines)


def find_books(data):
    """(kind, [(name, text)]): the data folder's books, else manuals of this machine, else made-up text."""
    books = sorted(glob.glob(os.path.join(data, "haystack", "*.txt"))) if data else []
    if books:
        return "books", [(os.path.basename(b), gen.open_text(b)) for b in books]
    manuals = sorted(glob.glob("/usr/share/doc/debian-policy/**/*.txt.gz", recursive=True))
    texts = [(os.path.basename(m), gen.open_text(m)) for m in manuals]
    if sum(len(t) for _, t in texts) > 500000:
        return "manuals", texts
    return "made-up", [("made-up", made_up_book())]


class Options:
    """The generator's settings that the tasks here use."""
    overhead, keys, values, queries, hops, uuid = 0, N_ASK, 3, 2, 2, False


def generator(data):
    kind, texts = find_books(data)
    return kind, gen.Gen(gen.Haystack(texts), dict(gen.DEFAULT_TEMPLATES), Options)


# ---- Tasks: (generator, name, tokens of filler, depths) -> [(text, [Question])] ------------

def one_fact(g, name, depths, units, fact):
    """One context per depth; fact(rng) -> (intro, sentence, Question)."""
    out = []
    for depth in depths:
        intro, sentence, question = fact(gen.rng_for(name, "fact", depth))
        question.ident, question.depth = "d%03d" % round(depth * 100), depth
        text = gen.join(gen.insert(units, [sentence], [depth]))
        out.append((intro + "\n\n" + text if intro else text, [question]))
    return out


def passkey(g, name, budget, depths):
    t, units, left = g.t, [], budget
    costs = [gen.est_tokens(s) for s in t["filler"]]
    while left > 0:
        i = len(units) % len(costs)
        units.append((t["filler"][i], " " if i < len(costs) - 1 else "\n"))
        left -= costs[i]

    def fact(rng):
        v = gen.digits(rng, 5)
        return (t["passkey_intro"], t["passkey_needle"].format(v=v),
                Question("", t["passkey_question"], [v], max_tokens=12))
    return one_fact(g, name, depths, units, fact)


def number_string(g, name, budget, depths):
    t = g.t
    units, _ = g.h.cut(gen.rng_for(name), budget)

    def fact(rng):
        v = "".join(c * rng.randint(1, 3) for c in gen.digits(rng, 6))[:12]
        return (t["number_intro"], t["number_needle"].format(v=v),
                Question("", t["number_question"], [v], max_tokens=24))
    return one_fact(g, name, depths, units, fact)


def niah_single(g, name, budget, depths):
    t = g.t
    units, _ = g.h.cut(gen.rng_for(name), budget)

    def fact(rng):
        k, v = gen.key(rng, set()), gen.digits(rng, 7)
        return None, t["niah_needle"].format(k=k, v=v), Question("", t["niah_question"].format(k=k), [v])
    return one_fact(g, name, depths, units, fact)


def niah_multikey(g, name, budget, depths):
    del depths  # as many as there are keys, evenly
    t, rng, used = g.t, gen.rng_for(name), set()
    units, _ = g.h.cut(rng, budget)
    facts = [(gen.key(rng, used), gen.digits(rng, 7), (i + rng.random()) / N_ASK) for i in range(N_ASK)]
    text = gen.join(gen.insert(units, [t["niah_needle"].format(k=k, v=v) for k, v, _ in facts],
                               [d for _, _, d in facts]))
    return [(text, [Question("q%d" % i, t["niah_question"].format(k=k), [v], d)
                    for i, (k, v, d) in enumerate(facts)])]


def facts(g, name, budget, depths):
    """Eight facts of three kinds in one book: for texts that take too long to read once per fact."""
    del depths  # evenly, the codes around the two that have no name
    t, rng, used = g.t, gen.rng_for(name), set()
    units, _ = g.h.cut(rng, budget)
    out = []
    for i in range(N_ASK):
        at = (i + rng.random()) / N_ASK
        if i == 2:
            v = gen.digits(rng, 5)
            out.append((t["passkey_needle"].format(v=v), Question("passkey", t["passkey_question"], [v], at, max_tokens=12)))
        elif i == 5:
            v = "".join(c * rng.randint(1, 3) for c in gen.digits(rng, 6))[:12]
            out.append((t["number_needle"].format(v=v), Question("number", t["number_question"], [v], at, max_tokens=24)))
        else:
            k, v = gen.key(rng, used), gen.digits(rng, 7)
            out.append((t["niah_needle"].format(k=k, v=v), Question("code%d" % i, t["niah_question"].format(k=k), [v], at)))
    text = gen.join(gen.insert(units, [sentence for sentence, _ in out], [q.depth for _, q in out]))
    return [(text, [q for _, q in out])]


def kv(g, name, budget, depths):
    del depths
    t, rng, items, left, seen = g.t, gen.rng_for(name), [], budget, set()
    while left > 0:
        k, v = "%08x" % rng.getrandbits(32), "%08x" % rng.getrandbits(32)
        if k in seen:
            continue
        seen.add(k)
        items.append((k, v))
        left -= gen.est_tokens('"%s": "%s",\n' % (k, v))
    text = t["kv_intro"] + "\n\n{" + ",\n ".join('"%s": "%s"' % pair for pair in items) + "}"
    asked = [int((i + 0.5) / N_ASK * len(items)) for i in range(N_ASK)]
    return [(text, [Question("q%d" % i, t["kv_question"].format(k=items[at][0]), [items[at][1]], at / len(items))
                    for i, at in enumerate(asked)])]


def question_first(base, n_keep):
    """The question also stands before the context, which therefore serves it alone."""
    def build(g, name, budget, depths):
        out = []
        for text, questions in base(g, name, budget, depths):
            for i in range(n_keep):
                q = questions[int((i + 0.5) / n_keep * len(questions))]
                out.append((q.text + "\n\n" + text, [q]))
        return out
    return build


TASKS = {"passkey": passkey, "number_string": number_string, "niah_single": niah_single,
         "niah_multikey": niah_multikey, "facts": facts, "kv": kv,
         "passkey_first": question_first(passkey, 1), "kv_first": question_first(kv, 3)}


def default_depths(length):
    return [0.05, 0.25, 0.5, 0.75, 0.95] if length <= 16384 else [0.1, 0.5, 0.9]


def calibrate(build, length, count):
    """The filler at which a context and its frame have at most `length` tokens, and hardly fewer."""
    budget, want = length, length - FRAME
    for _ in range(5):
        n = count(build(budget)[0][0])
        if 0.985 * want <= n <= want:
            break
        budget = int(budget * 0.994 * want / n)
    return budget


def generated(g, kind, task, length, sample, seed, count, depths=None):
    """The contexts of one sample; count(text) -> tokens."""
    books = "" if task.startswith(("kv", "passkey")) else "-" + kind
    group = "%s-%d-s%s.%d%s" % (task, length, seed, sample, books)
    wanted = depths or default_depths(length)

    def build(budget, at=None):
        return TASKS[task](g, group, budget, at or [wanted[0]])
    texts = build(calibrate(build, length, count), wanted)
    out = []
    for i, (text, questions) in enumerate(texts):
        for q in questions:
            q.ident = "%s-%s" % (group, q.ident)
        out.append(Context("%s-%d" % (group, i), text, questions, task, length, group))
    return out


# ---- Question sets of the data folder -----------------------------------------------------

def read_ids(path):
    with open(path, encoding="utf-8") as file:
        return [line.split()[0] for line in file if line.strip() and not line.startswith("#")]


def question_set(data, name):
    """Contexts of data/subsets/NAME.txt, in the file's order; questions of one text together."""
    ids = read_ids(os.path.join(data, "subsets", name + ".txt"))
    rank = {ident: i for i, ident in enumerate(ids)}
    rows = [r for r in score.read_jsonl([os.path.join(data, "data", "*.jsonl.xz")]) if r["id"] in rank]
    rows.sort(key=lambda r: rank[r["id"]])
    contexts = {}
    for r in rows:
        if r["metric"] == "nll":
            continue
        key = r.get("context_id") or r["id"]
        if key not in contexts:
            contexts[key] = Context(key, r["context"], [], r["task"], None)
            contexts[key].subset, contexts[key].raw = name, bool(r.get("raw"))
        contexts[key].n_tokens = max(contexts[key].n_tokens, r["n_tokens"])
        question = Question(r["id"], r["question"], r["answers"], r.get("depth"), r["metric"],
                            max(1, r["max_new_tokens"]))
        contexts[key].questions.append(question)
    return list(contexts.values())
