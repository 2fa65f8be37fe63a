"""Captions to token ids: by a trained BPE vocabulary (`bpe`), or by that of CLIP (`clip`)."""

import os
import pathlib

from dalle_jax.errors import UserError
from dalle_jax.text import clip
from dalle_jax.text.bpe import BPETokenizer

Tokenizer = BPETokenizer | clip.CLIPTokenizer  # both have vocab_size, digest, encode(caption) and save(folder)


def load_tokenizer(path: str | os.PathLike, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that was saved in a folder or as a file.

    vocab_size: of the model that it is for.

    Raises:
      UserError: nothing there, not a tokenizer, or one of another size.
    """
    path = pathlib.Path(path)
    is_clip = path.name == clip.FILE_NAME or (path / clip.FILE_NAME).exists()
    tokenizer = clip.CLIPTokenizer.load(path) if is_clip else BPETokenizer.load(path)
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"expected a tokenizer of {vocab_size} entries in {path}, got {tokenizer.vocab_size}: "
            "put the one back that the model was trained with"
        )
    return tokenizer
