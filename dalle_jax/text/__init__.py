"""Captions to token ids: a BPE vocabulary of our own (`bpe`), or CLIP's (`clip`)."""

import os
import pathlib
from typing import Protocol

from dalle_jax.text import clip
from dalle_jax.text.bpe import BPETokenizer


class Tokenizer(Protocol):
    """A vocabulary; immutable, thread-safe, picklable.

    Attributes:
      vocab_size: ids are 0 .. vocab_size - 1.
      digest: SHA-256 (hex) that tells two vocabularies apart.
    """

    vocab_size: int
    digest: str

    def encode(self, caption: str) -> list[int]:
        """Token ids of a caption of any length, without start, end or padding."""
        ...

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Write the vocabulary into a folder; returns the file."""
        ...


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that was saved in a folder or as a file.

    Raises:
      UserError: nothing there, or not a tokenizer.
    """
    path = pathlib.Path(path)
    if path.name == clip.FILE_NAME or (path / clip.FILE_NAME).exists():
        return clip.CLIPTokenizer.load(path)
    return BPETokenizer.load(path)
