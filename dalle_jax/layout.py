"""The token sequence: vocabularies, padding, positions, targets and loss weights.

The sequence is `text_len` text positions, then `grid * grid` image positions in raster order. The input is the token
stream shifted right by one (the reading of figure 10 chosen here):

    text position 0     start of text; position p reads token p - 1 of the caption, or the padding vector of position p
    image position 0    start of image, plus row 0 and column 0; position p reads image token p - 1

Text position p predicts what text position p + 1 reads (padding included), image position p predicts image token p,
and the last text position predicts nothing. Every text position has a padding vector for itself (section 2.2); position
0 never pads, so its vector is the start of text. Text and image have separate vocabularies, embeddings and heads.

Published models differ in what they begin with, `LAYOUTS`. CLIP reads captions in another layout, `CaptionLayout`.
"""

import dataclasses

import numpy as np

from dalle_jax.errors import check_sizes

TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT = 1 / 8, 7 / 8  # section 2.2


# Where the first image token is predicted: at an image position that reads the start of image ('start', Ramesh et al.
# 2021) or the last id of the text ('text', ru-DALL-E's first Malevich), or at the last text position ('none').
FIRST = ("start", "text", "none")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one model's sequence; every derived size and index comes from here.

    text_len: text positions, the start included, so a caption has room for text_len - 1 tokens.
    text_vocab: entries of the BPE vocabulary. grid: image tokens per side. image_vocab: entries of the codebook.
    first: one of FIRST; with 'start' the text begins with a start, too. marks: entries of the vocabulary that stand
    before and after a caption's tokens, as far as there is room. pad: the entry that fills the rest; None for a vector
    of each position.
    """

    text_len: int = 256
    text_vocab: int = 16_384
    grid: int = 32
    image_vocab: int = 8_192
    first: str = "start"
    marks: tuple[int, int] | None = None
    pad: int | None = None

    def __post_init__(self):
        check_sizes(self, "text_len", min=2)
        check_sizes(self, "text_vocab", "grid", "image_vocab")
        if self.first not in FIRST:
            raise ValueError(f"first must be one of {FIRST}, got {self.first!r}")
        if self.first == "text" and self.marks is None:
            raise ValueError("marks must be given where first is 'text', as one more stands before the text")
        if not all(0 <= entry < self.text_vocab for entry in (*(self.marks or ()), self.pad or 0)):
            raise ValueError(
                f"marks and pad must be below text_vocab = {self.text_vocab}, got {self.marks}, {self.pad}"
            )

    @property
    def image_len(self) -> int:
        return self.grid * self.grid

    @property
    def length(self) -> int:
        return self.text_len + self.image_len

    @property
    def text_slots(self) -> int:
        """Positions that read an id of the text, and entries of `caption_ids`."""
        return self.text_len + (self.first == "text")

    @property
    def caption_len(self) -> int:
        """Tokens of a caption that are kept, at most; the mark behind them is not kept at their cost."""
        return self.text_len - (self.first == "start" or self.marks is not None)

    @property
    def text_ids(self) -> int:
        """Rows of the text embedding and width of the text head: BPE entries, then one padding id per position."""
        return self.text_vocab + (self.text_len if self.pad is None else 0)

    @property
    def logits(self) -> int:
        """Logits of a whole sequence."""
        return self.text_len * self.text_ids + self.image_len * self.image_vocab

    @property
    def start_of_text(self) -> int:
        return self.text_vocab

    @property
    def start_of_image(self) -> int:
        """An input id only: the image head never predicts it."""
        return self.image_vocab

    @property
    def image_ids(self) -> int:
        """Rows of the image embedding: the image tokens and the start of image."""
        return self.image_vocab + (self.first == "start")

    def caption_ids(self, tokens) -> np.ndarray:
        """Caption tokens -> int32 [text_slots], the ids that the text positions read; what does not fit is cut off.

        Raises:
          ValueError: a token outside [0, text_vocab).
        """
        tokens = _checked(tokens, self.caption_len, self.text_vocab)
        if self.marks is not None:
            tokens = np.array([self.marks[0], *tokens, self.marks[1]], np.int32)[: self.text_len]
        padding = self.text_vocab + np.arange(self.text_len) if self.pad is None else np.full(self.text_len, self.pad)
        begin = 1 if self.first == "start" else 0
        ids = np.concatenate([padding[:begin], tokens, padding[begin + tokens.size :]]).astype(np.int32)
        return np.insert(ids, 0, self.marks[0]) if self.first == "text" and self.marks else ids


@dataclasses.dataclass(frozen=True)
class CaptionLayout:
    """The text that CLIP reads: start mark, tokens, end mark, zeros (Radford et al. 2021, section 2.4).

    text_len: positions, both marks included. text_vocab: entries of the BPE vocabulary without the marks; the released
    CLIP's has 256 bytes, 256 bytes that end a word and 48,894 merges.
    """

    text_len: int = 77
    text_vocab: int = 49_406

    def __post_init__(self):
        check_sizes(self, "text_len", min=3)
        check_sizes(self, "text_vocab")

    @property
    def caption_len(self) -> int:
        """Tokens of a caption that are kept, at most."""
        return self.text_len - 2

    @property
    def text_ids(self) -> int:
        """Rows of the text embedding: BPE entries and the two marks."""
        return self.text_vocab + 2

    @property
    def start_of_text(self) -> int:
        return self.text_vocab

    @property
    def end_of_text(self) -> int:
        """The highest id, at whose first place the caption's feature is read; what follows it is seen by nothing."""
        return self.text_vocab + 1

    def caption_ids(self, tokens) -> np.ndarray:
        """Caption tokens -> int32 [text_len]; what does not fit is cut off, the end mark stays.

        Raises:
          ValueError: a token outside [0, text_vocab).
        """
        tokens = _checked(tokens, self.caption_len, self.text_vocab)
        ids = np.zeros(self.text_len, np.int32)
        ids[: tokens.size + 2] = [self.start_of_text, *tokens, self.end_of_text]
        return ids


def _checked(tokens, max_tokens: int, vocab: int) -> np.ndarray:
    """The first `max_tokens` tokens as int32; ValueError for one outside [0, vocab)."""
    tokens = np.asarray(tokens, np.int32)[:max_tokens]
    if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab):
        raise ValueError(
            f"text tokens must be in [0, {vocab}), got {tokens.min()} .. {tokens.max()}: "
            "the tokenizer does not belong to this model"
        )
    return tokens
