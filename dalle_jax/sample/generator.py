"""`Generator`: what `Pipeline` needs of a model that makes images from captions.

Drawing goes in steps. After its last step a candidate is a draft: image tokens of a transformer, for example, or a
small image of a diffusion cascade. Drafts are cheap to rank; only those that are returned are finished.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from dalle_jax.sample.batches import Capacity
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from dalle_jax.sample.request import Option, Request


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request: read from its caption (and how many of a caption the model can read), read from its image,
    and drawn for each candidate."""

    text_tokens: int
    max_text_tokens: int
    image_tokens: int
    drawn_tokens: int


class Generator(Protocol):
    """A model on the devices. P prompts, M candidates of each, B images.

    Attributes:
      digest: sha256 (hex) of everything that decides what the images look like.
      image_size: height and width of finished images in pixels.
      options: settings of its requests beside the common ones, with this model's bounds.
      batch_multiple: a factor of the number of images of every batch.
      decode_batch: images that are decoded at a time, so that the memory does not grow with their number.
    """

    digest: str
    image_size: int
    options: tuple[Option, ...]
    batch_multiple: int
    decode_batch: int

    @property
    def image_tokenizer(self) -> ImageTokenizer | None:
        """The one whose image tokens, int32 [R, C], the drafts are; None if they are something else."""

    def check(self, request: Request) -> None:
        """Raises RequestError for a request, its numbers within their bounds, that this model cannot draw."""

    def capacity(self, *, guided: bool) -> Capacity:
        """The maximum number of images in a batch, guided or not."""

    def batch_key(self, request: Request) -> Hashable:
        """Requests of equal keys can be drawn by one program."""

    def steps(self, request: Request) -> range:
        """The steps that draw something new; those before the first only repeat the image to complete."""

    def start(self, requests: Sequence[Request], seeds_PM: np.ndarray) -> Any:
        """The state of a batch before its first step. seeds_PM: uint32, one for each candidate."""

    def advance(self, state: Any, first: int, last: int) -> Any:
        """The state after the steps first .. last - 1; `state` must not be used again."""

    def drafts(self, state: Any) -> np.ndarray:
        """[P, M, ...]: the drafts as far as they are drawn; waits for the devices."""

    def preview(self, drafts: np.ndarray, step: int) -> np.ndarray:
        """uint8 [B, H, W, 3]: what can be seen of drafts [B, ...] after `step` steps; at the end, what CLIP ranks."""

    def finish(self, drafts: np.ndarray, request: Request, seeds: Sequence[int]) -> np.ndarray:
        """uint8 [B, image_size, image_size, 3]: the images of complete drafts [B, ...] of a request."""

    def settings(self, request: Request) -> dict[str, Any]:
        """The settings that the images of a request are made with, as JSON values."""

    def usage(self, request: Request) -> Usage:
        """The tokens that the request reads and draws."""

    def describe(self) -> dict[str, Any]:
        """Sizes of the model that a client may want to know, as JSON values."""
