"""The text tokenizer of ru-DALL-E Malevich: a model file of YouTokenToMe, applied by the package `tokenizers`.

The file is text: a line with the numbers n of characters and m of rules; n lines with a code point and its id; m lines
with the ids of the left and right part and of what a rule makes of them, in the order in which rules are applied; the
ids of the unknown, padding, begin and end marks.

YouTokenToMe applies, word by word, the first rule of the file that fits anywhere, at its leftmost place, until none
fits. That is BPE over strings with the rules as merges, if no two rules make the same string; training makes no such
two, and a file that has them is refused. Words end at ASCII white space and begin with U+2581, which counts as a space
in captions; unknown characters that follow each other get the mark for unknown once.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dalle_jax.text.published import PublishedTokenizer, bpe, reading

SPACE = "\u2581"
UNKNOWN, PAD, BEGIN, END = 1, 0, 2, 3  # rudalle's tokenizer.py has them as constants
_UNKNOWN = " "  # the name of that entry here: no other entry holds a space
_SPACES = re.compile(f"[ \t-\r{SPACE}]+")


class MalevichTokenizer(PublishedTokenizer):
    """YouTokenToMe's encoder on a caption in lower case; see `PublishedTokenizer`.

    `pad` is None because the model has a padding vector for each position in place of the file's id 0.
    """

    family = "malevich"
    marks = (BEGIN, END)

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        vocab, merges = _parse(content["model"])
        self._bpe = bpe(vocab, merges, unk_token=_UNKNOWN, fuse_unk=True)
        self.vocab_size = max(vocab.values()) + 1

    @classmethod
    def read(cls, file: str | os.PathLike) -> "MalevichTokenizer":
        """Read bpe.model of rudalle.

        Raises:
          UserError: it is not there, or not such a file.
        """
        file = pathlib.Path(file)
        with reading(file, cls.family):
            content = {"model": file.read_text(encoding="utf-8")}
        return cls._made_of(file, content)

    def _ids(self, caption: str) -> list[int]:
        words = [SPACE + word for word in _SPACES.split(caption.lower().strip()) if word]
        return self._bpe.encode(words, is_pretokenized=True).ids


def _parse(model: str) -> tuple[dict[str, int], list[str]]:
    """Entries with their ids, and merges; ValueError for a text that is not a whole model."""
    counts, *lines = [[int(number) for number in line.split()] for line in model.split("\n") if line.strip()] or [[]]
    if len(counts) != 2 or min(counts) < 0:
        raise ValueError("the first line must have two numbers, of characters and of rules")
    characters, rules = lines[: counts[0]], lines[counts[0] : sum(counts)]
    if len(lines) != sum(counts) + 1 or list(map(len, lines)) != [2] * counts[0] + [3] * counts[1] + [4]:
        raise ValueError(
            f"{counts[0]} lines of 2 numbers, {counts[1]} of 3 and one of 4 must follow the first, got {len(lines)}"
        )
    if lines[-1] != [UNKNOWN, PAD, BEGIN, END]:
        raise ValueError(
            f"the last line must be the marks {UNKNOWN} {PAD} {BEGIN} {END}, got {' '.join(map(str, lines[-1]))}"
        )
    names = {i: chr(code) for code, i in characters}
    merges = []
    for line, (left, right, made) in enumerate(rules, start=2 + counts[0]):
        if not {left, right} <= names.keys() or made in names:
            raise ValueError(f"the rule in line {line} must make a new id of two that lines before it have")
        merges.append(f"{names[left]} {names[right]}")
        names[made] = names[left] + names[right]
    vocab = {name: i for i, name in names.items()} | {_UNKNOWN: UNKNOWN}
    if sorted(names) != list(range(END + 1, END + 1 + sum(counts))) or len(vocab) != len(names) + 1:
        raise ValueError(f"the ids must be {END + 1} .. {END + sum(counts)}, each of another string")
    if SPACE not in vocab:
        raise ValueError("the character U+2581, which begins a word, is missing")
    return vocab, merges
