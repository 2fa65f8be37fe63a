"""The token sequence: vocabularies, padding, positions, targets and loss weights.

The sequence is `text_len` text slots followed by `grid * grid` image slots in raster order. The input is the token
stream shifted right by one (the reading of figure 10 chosen here):

    text slot 0        start of text; text slot p reads token p - 1 of the caption, or the padding vector of slot p
    image slot 0       start of image, plus row 0 and column 0; image slot p reads image token p - 1

Text slot p predicts what text slot p + 1 reads (padding included), image slot p predicts image token p, and the last
text slot predicts nothing. Every text slot has a padding vector of its own (section 2.2); slot 0 never pads, so its
vector is the start of text. Text and image have separate vocabularies, embeddings and output heads.

CLIP reads captions in a layout of its own, `CaptionLayout`.
"""

import dataclasses

import numpy as np

TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT = 1 / 8, 7 / 8  # section 2.2


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one model's sequence; every derived size and index comes from here.

    text_len: text slots, the start included, so a caption has room for text_len - 1 tokens.
    text_vocab: entries of the BPE vocabulary. grid: image tokens per side. image_vocab: codes of the dVAE.
    """

    text_len: int = 256
    text_vocab: int = 16_384
    grid: int = 32
    image_vocab: int = 8_192

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 2 if field.name == "text_len" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")

    @property
    def image_len(self) -> int:
        return self.grid * self.grid

    @property
    def length(self) -> int:
        return self.text_len + self.image_len

    @property
    def caption_len(self) -> int:
        """Most tokens of a caption that are kept."""
        return self.text_len - 1

    @property
    def text_ids(self) -> int:
        """Rows of the text embedding and width of the text head: BPE entries, then one padding id per slot."""
        return self.text_vocab + self.text_len

    @property
    def logits(self) -> int:
        """Numbers that a whole sequence's predictions are made of."""
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
        """Rows of the image embedding: the codes and the start of image."""
        return self.image_vocab + 1

    def text_slots(self, tokens) -> np.ndarray:
        """Caption tokens -> int32 [text_len] of text ids as the slots read them; what does not fit is cut off.

        Raises:
          ValueError: a token outside [0, text_vocab).
        """
        tokens = _checked(tokens, self.caption_len, self.text_vocab)
        slots = self.text_vocab + np.arange(self.text_len, dtype=np.int32)
        slots[1 : 1 + tokens.size] = tokens
        return slots

    def caption_tokens(self, text_slots) -> list[int]:
        """The inverse of `text_slots`: the tokens of one caption without start and padding."""
        return [int(i) for i in np.asarray(text_slots)[1:] if i < self.text_vocab]


@dataclasses.dataclass(frozen=True)
class CaptionLayout:
    """The text that CLIP reads: start mark, tokens, end mark, zeros (Radford et al. 2021, section 2.4).

    text_len: slots, both marks included. text_vocab: entries of the BPE vocabulary without the marks; CLIP's own has
    256 bytes, 256 bytes that end a word and 48,894 merges.
    """

    text_len: int = 77
    text_vocab: int = 49_406

    def __post_init__(self):
        for field, least in (("text_len", 3), ("text_vocab", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")

    @property
    def caption_len(self) -> int:
        """Most tokens of a caption that are kept."""
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

    def text_slots(self, tokens) -> np.ndarray:
        """Caption tokens -> int32 [text_len]; what does not fit is cut off, the end mark stays.

        Raises:
          ValueError: a token outside [0, text_vocab).
        """
        tokens = _checked(tokens, self.caption_len, self.text_vocab)
        slots = np.zeros(self.text_len, np.int32)
        slots[: tokens.size + 2] = [self.start_of_text, *tokens, self.end_of_text]
        return slots


def _checked(tokens, most: int, vocab: int) -> np.ndarray:
    """The first `most` tokens as int32; ValueError for one outside [0, vocab)."""
    tokens = np.asarray(tokens, np.int32)[:most]
    if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab):
        raise ValueError(
            f"text tokens must be in [0, {vocab}), got {tokens.min()} .. {tokens.max()}: "
            "the tokenizer does not belong to this model"
        )
    return tokens
