"""Captions to token ids: by a trained BPE vocabulary (`bpe`), by that of CLIP (`clip`) or of a published model."""

import json
import os
import pathlib

from dalle_jax.errors import UserError
from dalle_jax.layout import CaptionLayout, Layout
from dalle_jax.text import bpe, clip, published
from dalle_jax.text.bart import DALLEMiniTokenizer, MinDalleTokenizer
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.text.clip import CLIPTokenizer
from dalle_jax.text.malevich import MalevichTokenizer
from dalle_jax.text.mindalle import MinDALLETokenizer
from dalle_jax.text.published import PublishedTokenizer

# All have vocab_size, digest, encode(caption) and save(folder).
TrainingTokenizer = BPETokenizer | PublishedTokenizer  # what a transformer in training reads captions with
Tokenizer = TrainingTokenizer | CLIPTokenizer
FILE_NAMES = (published.FILE_NAME, clip.FILE_NAME, bpe.FILE_NAME)  # one of them is in a folder that has a tokenizer
FAMILIES = {cls.family: cls for cls in (MinDALLETokenizer, MalevichTokenizer, DALLEMiniTokenizer, MinDalleTokenizer)}


def has_tokenizer(folder: pathlib.Path) -> bool:
    return any((folder / name).exists() for name in FILE_NAMES)


def load_tokenizer(path: str | os.PathLike, *, layout: Layout | CaptionLayout | None = None) -> Tokenizer:
    """The tokenizer that was saved in a folder or as a file.

    layout: of the model that it is for.

    Raises:
      UserError: nothing there, not a tokenizer, or one that does not fit the layout.
    """
    path = pathlib.Path(path)
    if path.name == published.FILE_NAME or (path / published.FILE_NAME).exists():
        tokenizer: Tokenizer = _load_published(path if path.name == published.FILE_NAME else path / published.FILE_NAME)
    elif path.name == clip.FILE_NAME or (path / clip.FILE_NAME).exists():
        tokenizer = CLIPTokenizer.load(path)
    else:
        tokenizer = BPETokenizer.load(path)
    if layout is not None:
        check_fits(tokenizer, layout, path)
    return tokenizer


def check_fits(tokenizer: Tokenizer, layout: Layout | CaptionLayout, path: str | os.PathLike) -> None:
    """Raises UserError, which names the path, for a tokenizer that is not one of the model with this layout.

    A published model's table of text tokens may have more rows than there are entries.
    """
    size, is_published = tokenizer.vocab_size, isinstance(tokenizer, PublishedTokenizer)
    if size > layout.text_vocab or (size < layout.text_vocab and not is_published):
        raise UserError(
            f"expected a tokenizer of {layout.text_vocab} entries in {path}, got {size}: "
            "put the one back that the model was trained with"
        )
    given = (tokenizer.marks, tokenizer.pad) if isinstance(tokenizer, PublishedTokenizer) else (None, None)
    wanted = (layout.marks, layout.pad) if isinstance(layout, Layout) else (None, None)
    if given != wanted:
        raise UserError(
            f"expected a tokenizer with the marks {wanted[0]} and the padding {wanted[1]} in {path}, got {given[0]} "
            f"and {given[1]}, those of another model: put the one back that the model was trained with"
        )


def _load_published(path: pathlib.Path) -> PublishedTokenizer:
    with published.reading(path, "a published model"):
        content = json.loads(path.read_text(encoding="utf-8"))
        return FAMILIES[content.pop("family")](content)
