"""The text cleaning and byte-level BPE of the released CLIPs, for imported weights.

The merges come from the user's file, in one of the two published forms; the library `tokenizers` applies them. Ids are
those of the released models: 256 bytes, 256 bytes that end a word, the merges. The start and end marks follow and
belong to `layout.CaptionLayout`, so a caption that spells a mark gets the tokens of its characters.
"""

import gzip
import hashlib
import html
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence

from dalle_jax import files
from dalle_jax.errors import UserError

FILE_NAME = "clip_tokenizer.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
MARKS = ("<|startoftext|>", "<|endoftext|>")
WORD_END = "</w>"
MAX_MERGES = 48_894  # the released vocabulary; its file lists more, which were never used

_INSTALL = "which is not installed: pip install 'dalle-jax[clip]'"
# Contractions, runs of letters, single digits, runs of anything else that is not a space.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def clean(caption: str) -> str:
    """The caption after the released preprocessing: ftfy, HTML entities resolved twice, single spaces, lower case."""
    return re.sub(r"\s+", " ", mend(caption)).strip().lower()


def mend(caption: str) -> str:
    """The caption with ftfy's repairs and HTML entities resolved twice; a run of digits ends after 1,000 of them, as
    Python makes no number of thousands that stand for a character."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError(f"CLIP's text cleaning takes the package ftfy, {_INSTALL}") from error
    return html.unescape(html.unescape(ftfy.fix_text(re.sub(r"([0-9]{1000})[0-9]+", r"\1", caption))))


class CLIPTokenizer:
    """A byte-level BPE vocabulary; immutable, thread-safe.

    Attributes:
      vocab_size: entries without the marks; ids are 0 .. vocab_size - 1.
      digest: SHA-256 (hex) of the merges, which tells two vocabularies apart.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        """vocab: token -> id without the marks. `load` is the usual constructor.

        Raises:
          ValueError: ids that are not 0 .. n - 1, a byte without an entry, or a merge of unknown entries.
        """
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"the ids of {len(vocab)} entries must be 0 .. {len(vocab) - 1}")
        missing = [b for b in _BYTES for end in ("", WORD_END) if b + end not in vocab]
        if missing:
            raise ValueError(f"{len(missing)} of the 512 byte entries are missing, {missing[0]!r} among them")
        if odd := next((m for m in merges if not {*m, "".join(m)} <= vocab.keys()), None):
            raise ValueError(f"the merge {' '.join(odd)!r} is of entries that are not in the vocabulary")
        self._vocab, self._merges = dict(vocab), [(left, right) for left, right in merges]
        self.vocab_size = len(vocab)
        content = json.dumps([sorted(self._vocab.items(), key=lambda item: item[1]), self._merges])
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._bpe = _pipeline(self._vocab, self._merges)

    def __reduce__(self):
        return CLIPTokenizer, (self._vocab, self._merges)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CLIPTokenizer":
        """Read `bpe_simple_vocab_16e6.txt.gz` (or unpacked), a folder with vocab.json and merges.txt, or the file that
        `save` writes or its folder.

        Raises:
          UserError: nothing there, or not such a vocabulary.
        """
        path = pathlib.Path(path)
        try:
            if path.is_dir() and (path / FILE_NAME).exists():
                return cls._from_saved(path / FILE_NAME)
            if path.is_dir():
                return cls._from_vocab_and_merges(path)
            return cls._from_saved(path) if path.suffix == ".json" else cls._from_merge_list(path)
        except OSError as error:
            raise UserError(
                f"expected CLIP's vocabulary in {path}, got {error.strerror or error}: give "
                f"bpe_simple_vocab_16e6.txt.gz, or a folder with {VOCAB} and {MERGES}"
            ) from error
        except (ValueError, TypeError, AttributeError, KeyError, EOFError) as error:
            raise UserError(f"expected CLIP's vocabulary in {path}, got another file: {error}") from error

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Write clip_tokenizer.json into a folder; returns the file."""
        file = pathlib.Path(path) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"vocab": self._vocab, "merges": [" ".join(merge) for merge in self._merges]}
        files.write(file, json.dumps(content, ensure_ascii=False))
        return file

    def encode(self, caption: str) -> list[int]:
        """Token ids of a caption, which is cleaned first; without marks, of any length."""
        return self._bpe.encode(clean(caption)).ids

    @classmethod
    def _from_saved(cls, file: pathlib.Path) -> "CLIPTokenizer":
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(content["vocab"], [_pair(line) for line in content["merges"]])

    @classmethod
    def _from_vocab_and_merges(cls, folder: pathlib.Path) -> "CLIPTokenizer":
        vocab = json.loads((folder / VOCAB).read_text(encoding="utf-8"))
        lines = (folder / MERGES).read_text(encoding="utf-8").strip().split("\n")
        merges = [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]
        marks = [vocab.pop(mark, None) for mark in MARKS]
        if marks != [len(vocab), len(vocab) + 1]:
            raise ValueError(f"the last two entries must be {MARKS[0]} and {MARKS[1]}")
        return cls(vocab, merges)

    @classmethod
    def _from_merge_list(cls, file: pathlib.Path) -> "CLIPTokenizer":
        data = file.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        merges = [_pair(line) for line in text.split("\n")[1 : MAX_MERGES + 1] if line.strip()]
        entries = [*_BYTES, *(byte + WORD_END for byte in _BYTES), *map("".join, merges)]
        return cls({entry: i for i, entry in enumerate(entries)}, merges)


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.strip().partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"a merge must be two entries with a space between, got {line[:40]!r}")
    return left, right


def _characters_of_bytes() -> tuple[str, ...]:
    """The character that stands for each byte, in the vocabulary's order: printable Latin-1 first, as itself."""
    shown = [b for b in range(256) if chr(b) > " " and (b < 127 or b > 160) and unicodedata.category(chr(b)) != "Cf"]
    hidden = [b for b in range(256) if b not in shown]
    return tuple([chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))])


_BYTES = _characters_of_bytes()


def _pipeline(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]):
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"CLIP's BPE takes the package tokenizers, {_INSTALL}") from error
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=dict(vocab), merges=list(merges), end_of_word_suffix=WORD_END, continuing_subword_prefix=""
        )
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    return bpe
