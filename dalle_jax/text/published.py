"""The part that the text tokenizers of published models share: one file in a folder, a digest, entries and merges.

Such a tokenizer is read from its model's own files by `read`. A folder then holds it as one json file, which says whose
it is. The package `tokenizers` applies the merges; none of these models has BPE dropout.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from dalle_jax import files
from dalle_jax.errors import MAX_SIZE, UserError, first_line

FILE_NAME = "text_tokenizer.json"
MAX_CAPTION = 32_000  # characters that are read, as many as a request may have; a model reads 128 tokens at most
INSTALL = "which is not installed: pip install 'dalle-jax[captions]'"


class PublishedTokenizer:
    """A vocabulary that belongs to published weights; immutable, thread-safe, picklable.

    Attributes:
      family: whose it is, as `dalle-jax convert` names the model.
      vocab_size: one more than the highest id that a caption can get.
      digest: SHA-256 (hex) of all that it is made of, which tells two vocabularies apart.
      marks, pad: entries around and behind a caption, as `layout.Layout` has them; `encode` gives none of them.
    """

    family: ClassVar[str]
    marks: tuple[int, int] | None = None
    pad: int | None = None
    vocab_size: int

    def __init__(self, content: Mapping[str, Any]):
        """content: what the json file holds but for the family. `read` and `load_tokenizer` are the usual constructors.

        Raises:
          ValueError, KeyError, TypeError: not the content of such a tokenizer.
        """
        self._content = dict(content)
        whole = json.dumps({"family": self.family, **self._content}, sort_keys=True, ensure_ascii=False)
        self.digest = hashlib.sha256(whole.encode()).hexdigest()

    def __reduce__(self):
        return type(self), (self._content,)

    def encode(self, caption: str) -> list[int]:
        """Token ids of any caption, without marks and padding, of any length. Lone surrogates are left out."""
        return self._ids(caption[:MAX_CAPTION].encode("utf-8", "ignore").decode())

    def _ids(self, caption: str) -> list[int]:
        raise NotImplementedError

    def save(self, folder: str | os.PathLike) -> pathlib.Path:
        """Write text_tokenizer.json into a folder; returns the file."""
        file = pathlib.Path(folder) / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, json.dumps({"family": self.family, **self._content}, ensure_ascii=False))
        return file

    @classmethod
    def _made_of(cls, path: pathlib.Path, content: Mapping[str, Any]) -> Self:
        with reading(path, cls.family):
            return cls(content)


@contextlib.contextmanager
def reading(path: pathlib.Path, family: str) -> Iterator[None]:
    """Raise UserError where the block does not find the text tokenizer of a family at a path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"expected the text tokenizer of {family} at {path}, got {error.strerror or error}: fetch the file that "
            "came with the model"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"expected the text tokenizer of {family} at {path}, got another or a damaged file ({what}): fetch it again"
        ) from error


def read_bpe(vocab: pathlib.Path, merges: pathlib.Path, family: str) -> dict[str, Any]:
    """The content of two files: a json object, entry -> id, and one merge a line below a line that says the version.

    Raises:
      UserError: one is not there or not of such a form.
    """
    with reading(vocab, family):
        entries = json.loads(vocab.read_text(encoding="utf-8"))
    with reading(merges, family):
        lines = merges.read_text(encoding="utf-8").split("\n")
    return {"vocab": entries, "merges": [line for line in lines if line and not line.startswith("#version")]}


def library():
    """The package `tokenizers`; UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"captions of published models take the package tokenizers, {INSTALL}") from error
    return tokenizers


def bpe(vocab: Mapping[str, int], merges: list[str], **options):
    """The package's Tokenizer by BPE, of entries with ids and of merges 'LEFT RIGHT', best first; options: of its BPE.

    Raises:
      UserError: the package is not installed.
      ValueError, TypeError, AttributeError: ids that are not different whole numbers, a merge of unknown entries.
    """
    package, ids = library(), list(vocab.values())
    if not all(type(i) is int and 0 <= i < MAX_SIZE for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("the ids of a vocabulary must be different whole numbers")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"the merge {' '.join(pair)!r} is not of two entries that make a third")
    return package.Tokenizer(package.models.BPE(vocab=dict(vocab), merges=pairs, **options))
