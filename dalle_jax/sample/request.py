"""`Request`: a caption with the settings of its images. `Option`: a setting's type, bounds, default and help.

Command line, Python, server and page read the same tables: `COMMON` here, and the options of the generator.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.data.decode import BadImage, to_pixels
from dalle_jax.errors import UserError, check_number

MAX_SEEDS = 2**32
MAX_CANDIDATES = 4096  # of one request
MAX_CAPTION = 32_000  # characters, far more than any model reads; the limit of a prompt in OpenAI's Images API


class RequestError(UserError):
    """A request that cannot be served. name: the argument at fault."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclasses.dataclass(frozen=True)
class Option:
    """A number that a request may set.

    kind: int or float. default: the value where none is given; None for what `unset` says.
    min, max: bounds, ends included; above: a lower bound that is itself excluded.
    completes: whether the option is for requests with an image to complete.
    """

    name: str
    kind: type[int] | type[float]
    default: int | float | None
    help: str
    min: float | None = None
    max: float | None = None
    above: float | None = None
    unset: str = ""
    completes: bool = False

    @property
    def flag(self) -> str:
        """The option of a command line: `-n`, `--best-of`."""
        return f"-{self.name}" if len(self.name) == 1 else f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, *, name: str | None = None) -> None:
        """Raises RequestError for a value of another type or out of bounds. name: in the message, if not its own."""
        try:
            check_number(
                name or self.name,
                value,
                min=self.min,
                max=self.max,
                above=self.above,
                whole=self.kind is int,
                optional=self.default is None,
            )
        except UserError as error:
            raise RequestError(self.name, str(error)) from error


COMMON = (
    Option("n", int, 1, "images for each caption", min=1, max=MAX_CANDIDATES),
    Option("best_of", int, None, "candidates from which CLIP chooses n", min=1, max=MAX_CANDIDATES, unset="no ranking"),
    Option("seed", int, None, "of the first image; the next has seed + 1", min=0, max=MAX_SEEDS - 1, unset="a new one"),
    Option("guidance", float, 1.0, "1 is none; above 1 follows the caption more closely", min=0, max=1000),
)


def caption_seed(seed: int, index: int, *, candidates: int) -> int:
    """Seed of the first candidate of a caption, where those before it have as many candidates each.

    So no two images of a call share a seed, and with it their noise. seed: of the first caption.
    """
    return seed + index * candidates


@dataclasses.dataclass(frozen=True)
class Request:
    """n images for a caption.

    n: images returned. best_of: candidates drawn, of which CLIP chooses the n that fit the caption best, best first;
      None draws n and ranks nothing.
    seed: candidate m has seed + m; an image depends on its seed, caption and settings only. Without one, a new one is
      drawn.
    guidance: 0 .. 1000; 1 is none, above it images follow the caption more closely.
    image: the image to complete.
    options: settings of the generator by name, such as `temperature`; those that are missing have their defaults.
    NumPy scalars become Python's numbers.
    """

    caption: str
    n: int = 1
    best_of: int | None = None
    seed: int = None  # type: ignore[assignment]  # __post_init__ draws one
    guidance: float = 1.0
    image: Image.Image | np.ndarray | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(MAX_SEEDS // 2))  # room for many captions behind it
        for option in COMMON:
            object.__setattr__(self, option.name, _as_python(getattr(self, option.name)))
        object.__setattr__(self, "options", {name: _as_python(value) for name, value in self.options.items()})

    @property
    def candidates(self) -> int:
        """Images drawn, of which n are returned."""
        return self.n if self.best_of is None else self.best_of

    def for_captions(self, captions: Sequence[str]) -> "list[Request]":
        """The same request for each of several captions, with seeds by `caption_seed`."""
        return [
            dataclasses.replace(self, caption=text, seed=caption_seed(self.seed, i, candidates=self.candidates))
            for i, text in enumerate(captions)
        ]

    def values(self, options: Iterable[Option]) -> dict[str, Any]:
        """The values of the generator's options, defaults filled in."""
        values = {option: self.options.get(option.name, option.default) for option in options}
        return {option.name: None if value is None else option.kind(value) for option, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Preview:
    """The state of a request after a step of its drawing, given to `on_progress`.

    request: index in the list of requests. step: finished steps, of `steps`, in the batch that is being drawn. share:
    of all the request's candidates, 0 .. 1. images: makes the first candidates of the batch, n at most, as PIL images
    of what is there so far; costs a decoding each time.
    """

    request: int
    step: int
    steps: int
    share: float
    images: Callable[[], list[Image.Image]]


def is_blank(caption: str) -> bool:
    """Whether nothing of a caption can be seen: only spaces, control characters and those of no width."""
    return not any(character.isprintable() and not character.isspace() for character in caption)


def check(request: Request, options: Iterable[Option]) -> None:
    """Refuse what no model could draw. options: the generator's.

    Raises:
      RequestError: one sentence with the name of the argument, its range and what came.
    """
    options, caption = list(options), request.caption
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION:
        got = f"{len(caption)} characters" if isinstance(caption, str) else repr(caption)
        raise RequestError("caption", f"caption must be a text of at most {MAX_CAPTION} characters, got {got}")
    if any(
        "\ud800" <= character <= "\udfff" for character in caption
    ):  # also from bytes of a command that are no UTF-8
        got = ascii(caption[:40])
        raise RequestError("caption", f"caption must be Unicode text, got {got} with half a surrogate pair")
    for option in COMMON:
        option.check(getattr(request, option.name))
    if request.best_of is not None and request.best_of < request.n:
        raise RequestError("best_of", f"best_of must be at least n = {request.n}, got {request.best_of}")
    if request.seed > MAX_SEEDS - request.candidates:
        limit = MAX_SEEDS - request.candidates
        raise RequestError("seed", f"seed must be at most 2**32 - candidates = {limit}, got {request.seed}")
    known = {option.name: option for option in options}
    for name, value in request.options.items():
        if name not in known:
            allowed = ", ".join(known)
            raise RequestError(name, f"expected options of this model ({allowed}), got {name!r}: leave it out")
        known[name].check(value)
        if known[name].completes and value is not None and request.image is None:
            raise RequestError(name, f"{name} needs an image to complete, got {value} without one")
    if request.image is not None:
        pixels_of(request.image)


def pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of an image from outside, turned upright and laid on white as in training.

    Raises:
      RequestError: another type, shape or dtype, or a file that is broken.
    """
    try:
        array = to_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
    except BadImage as error:
        raise RequestError("image", f"image must be one that can be read, got one where {error}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        got = f"{array.dtype} {array.shape}"
        raise RequestError("image", f"image must be a PIL image or uint8 [H, W, 3], got {got}")
    return array


def _as_python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
