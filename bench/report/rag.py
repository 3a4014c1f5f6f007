"""rag.py - retrieval-augmented prompting: passages of a text, ranked, the best ones into a prompt.

The rule that matters most: this is the alternative that most people would pick, so it gets what makes it good -
passages end at sentences, and its prompt is filled to the last token of the budget. Passages stand in the order
of the text, which small models read better than the order of rank.

Sources: BM25 as in Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", eq. 3.15, k1 = 1.2,
b = 0.75. Embeddings: minilm.py.

SPDX-License-Identifier: Apache-2.0
"""
import collections
import math
import re
import subprocess

PASSAGE = 512  # tokens of the model that answers
SLACK = 64     # how far back from there a passage may end, to end with a sentence
K1, B = 1.2, 0.75
ESCAPES = {"n": b"\n", "t": b"\t", "\\": b"\\"}


def unescape(text):
    """Bytes of a token as `kvfold tokenize` prints it: \\n, \\t, \\\\ and \\xHH."""
    out, at = b"", 0
    for m in re.finditer(r"\\(x[0-9a-fA-F]{2}|.)", text):
        out += text[at:m.start()].encode("utf-8", "surrogateescape")
        out += ESCAPES[m[1]] if m[1] in ESCAPES else bytes([int(m[1][1:], 16)])
        at = m.end()
    return out + text[at:].encode("utf-8", "surrogateescape")


def tokens_of(kvfold, text):
    """Tokens of the text as bytes, in order."""
    run = subprocess.run([kvfold.program, "tokenize", "-m", kvfold.model, "-"], input=text.encode(), check=True,
                         stdout=subprocess.PIPE)
    lines = run.stdout.decode("utf-8", "surrogateescape").split("\n")
    return [unescape(line.split("\t", 1)[1]) for line in lines if "\t" in line]


def passages(tokens, most=PASSAGE, slack=SLACK):
    """[(first, end)] over the tokens, each of at most `most`, ending with a sentence where one ends."""
    out, first = [], 0
    while first < len(tokens):
        end = min(first + most, len(tokens))
        if end < len(tokens):
            for at in range(end, max(first + 1, end - slack), -1):
                last = tokens[at - 1].rstrip(b" ")
                if last.endswith((b"\n", b".", b"!", b"?")):
                    end = at
                    break
        out.append((first, end))
        first = end
    return out


def terms(text):
    return re.findall(r"\w+", text.lower())


class Bm25:
    def __init__(self, texts):
        self.counts = [collections.Counter(terms(t)) for t in texts]
        self.lengths = [sum(c.values()) for c in self.counts]
        self.average = sum(self.lengths) / max(1, len(self.lengths)) or 1.0
        self.having = collections.Counter(word for c in self.counts for word in c)

    def scores(self, query):
        n, out = len(self.counts), []
        for counts, length in zip(self.counts, self.lengths):
            norm = K1 * (1 - B + B * length / self.average)
            out.append(sum(math.log(1 + (n - self.having[w] + 0.5) / (self.having[w] + 0.5)) *
                           counts[w] * (K1 + 1) / (counts[w] + norm) for w in terms(query) if counts[w]))
        return out


def fill(bounds, scores, budget):
    """The best passages, cut where the budget ends, in the order of the text: [(first, end)]."""
    room, chosen = budget, []
    for i in sorted(range(len(bounds)), key=lambda i: (-scores[i], i)):
        first, end = bounds[i]
        if room <= 0:
            break
        end = min(end, first + room)
        room -= end - first
        chosen.append((first, end))
    return sorted(chosen)


def joined(tokens, chosen):
    """The chosen stretches as text; what is not beside each other is set apart."""
    out, last = [], None
    for first, end in chosen:
        if last is not None and first != last:
            out.append(b"\n\n[...]\n\n")
        out.append(b"".join(tokens[first:end]))
        last = end
    return b"".join(out).decode("utf-8", "ignore")


class Index:
    """A text ready to be searched: its passages, and what ranks them ('bm25' or 'minilm')."""

    def __init__(self, kvfold, text, kind):
        self.tokens = tokens_of(kvfold, text)
        self.bounds = passages(self.tokens)
        texts = [b"".join(self.tokens[a:b]).decode("utf-8", "ignore") for a, b in self.bounds]
        if kind == "minilm":
            import minilm
            self.ranker = minilm.Ranker(texts)
        else:
            self.ranker = Bm25(texts)

    def prompt(self, question, budget):
        return joined(self.tokens, fill(self.bounds, self.ranker.scores(question), budget))
