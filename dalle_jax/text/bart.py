"""The text tokenizers of DALL-E mini and mega: BART's byte BPE, as dalle-mini and as min-dalle apply it.

Both use the same entries and merges, but each prepares captions in its own way, and so a caption can get other ids.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dalle_jax.errors import UserError
from dalle_jax.text.caption_normalizer import CaptionNormalizer
from dalle_jax.text.published import INSTALL, PublishedTokenizer, bpe, library, read_bpe, reading

MARKS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
UNKNOWN, MASK = "<unk>", "<mask>"
SPACE = "\u0120"  # the character for a space in byte-level BPE
WORDS = "enwiki-words-frequency.txt"


class _BartTokenizer(PublishedTokenizer):
    marks = (MARKS["<s>"], MARKS["</s>"])
    pad = MARKS["<pad>"]

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        vocab = content["vocab"]
        if {mark: vocab.get(mark) for mark in MARKS} != MARKS:
            raise ValueError(f"the first entries must be {', '.join(MARKS)}")
        self._bpe = bpe(vocab, content["merges"], unk_token=UNKNOWN)
        # No caption has the mask. It can stand last, where the smaller model's table has no row for it.
        self.vocab_size = 1 + max(i for entry, i in vocab.items() if entry != MASK)


class DALLEMiniTokenizer(_BartTokenizer):
    """`BartTokenizerFast` behind dalle-mini's normalizer of captions; see `PublishedTokenizer`."""

    family = "dalle-mini"

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        self._normalize = CaptionNormalizer(content["words"])
        self._bpe.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "DALLEMiniTokenizer":
        """Read tokenizer.json and enwiki-words-frequency.txt of a folder.

        Raises:
          UserError: they are not there, or not such files.
        """
        path, words = pathlib.Path(folder) / "tokenizer.json", pathlib.Path(folder) / WORDS
        with reading(path, cls.family):
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            if model.get("type", "BPE") != "BPE":
                raise ValueError(f"its model must be BPE, got {model['type']!r}")
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        with reading(words, cls.family):
            ranked = [line.split()[0] for line in words.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not ranked:
                raise ValueError("it has no words")
        return cls._made_of(path, {"vocab": model["vocab"], "merges": merges, "words": "\n".join(ranked)})

    def _ids(self, caption: str) -> list[int]:
        return self._bpe.encode(self._normalize(caption)).ids


class MinDalleTokenizer(_BartTokenizer):
    """min-dalle's tokenizer; see `PublishedTokenizer`.

    Emoji become their names, letters lower case, and what is then not ASCII is left out. Words end at spaces alone, so
    that merges may join letters, digits and punctuation, and other white space is unknown.
    """

    family = "min-dalle"

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        try:
            import emoji
        except ImportError as error:
            raise UserError(f"min-dalle's captions take the package emoji, {INSTALL}") from error
        self._demojize = emoji.demojize

    @classmethod
    def read(cls, folder: str | os.PathLike, *, suffix: str = "") -> "MinDalleTokenizer":
        """Read vocab.json and merges.txt of a folder; suffix: of both names, '_mini' where mini lies beside mega.

        Raises:
          UserError: they are not there, or not such files.
        """
        folder = pathlib.Path(folder)
        vocab = folder / f"vocab{suffix}.json"
        return cls._made_of(vocab, read_bpe(vocab, folder / f"merges{suffix}.txt", cls.family))

    def _ids(self, caption: str) -> list[int]:
        text = self._demojize(caption, delimiters=("", "")).lower().encode("ascii", "ignore").decode()
        words = [SPACE + word for word in text.split(" ") if word]
        return self._bpe.encode(words, is_pretokenized=True).ids
