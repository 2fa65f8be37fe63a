"""A small vocabulary of CLIP's kind, learned by the textbook from a few words, in both published forms."""

import collections
import gzip
import itertools
import json

from dalle_jax.text import clip
from dalle_jax.text.clip import MARKS, MERGES, VOCAB

WORDS = (
    "a photo of the red circle above blue square it's don't we'll they're i've i'm he'd naïve über 日本 слово".split()
)


def generated():
    """Merges that a byte-level BPE learns from WORDS, by the textbook."""
    counts = collections.Counter()
    for word in WORDS:
        symbols = [clip._BYTES[_place(b)] for b in word.encode()]
        counts[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    merges = []
    for _ in range(120):
        pairs = collections.Counter()
        for word, n in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        counts = collections.Counter({_merged(word, best): n for word, n in counts.items()})
    return merges


def _place(byte: int) -> int:
    """Where a byte stands in the vocabulary, read off the published rule."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return (shown + [b for b in range(256) if b not in shown]).index(byte)


def _merged(word, pair):
    out, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        out.append("".join(word[i : i + step]))
        i += step
    return tuple(out)


def write_merge_list(path, merges):
    lines = ["#version: a header", *map(" ".join, merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def write_vocab(folder, merges):
    folder.mkdir(exist_ok=True)
    entries = [*clip._BYTES, *(b + "</w>" for b in clip._BYTES), *map("".join, merges), *MARKS]
    (folder / VOCAB).write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), encoding="utf-8")
    (folder / MERGES).write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    return folder
