"""What is asked for: a caption and how to draw it, checked; and what is seen of it while it is drawn."""

import dataclasses
import math
import numbers
from collections.abc import Callable

import numpy as np
from PIL import Image

from dalle_jax.errors import UserError
from dalle_jax.models.transformer import TransformerConfig

MAX_SEED = 2**32
MAX_CANDIDATES = 4096  # of one request
MAX_CAPTION = 32_000  # characters, far more than the text slots of any model hold; a prompt's in OpenAI's Images API
TEMPERATURES = (0.001, 1000)  # at the ends nothing is left to chance, and everything; beyond, float32 runs over
MAX_GUIDANCE = 1000


@dataclasses.dataclass(frozen=True)
class Request:
    """n pictures for a caption.

    n: pictures returned. best_of: candidates drawn, of which CLIP chooses the n that fit the caption best, best first;
      None draws n and ranks nothing.
    seed: candidate m has seed + m, and a picture depends on its own seed, caption and settings only.
    temperature: 0.001 .. 1000; 1 is the paper's, lower is safer and less varied. top_k, top_p: draw only among the k
      most likely codes, or the most likely ones that reach probability p.
    guidance: 0 .. 1000; 1 is none, above it codes are drawn that the caption makes likelier (`sample/logits.py:guide`).
    image, keep_rows: complete this picture: the top keep_rows of the grid's rows of codes stay as they are (default:
      half of them).
    """

    caption: str
    n: int = 1
    best_of: int | None = None
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    image: Image.Image | np.ndarray | None = None
    keep_rows: int | None = None

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    def rows_kept(self, grid: int) -> int:
        return 0 if self.image is None else grid // 2 if self.keep_rows is None else self.keep_rows


@dataclasses.dataclass(frozen=True)
class Preview:
    """Given to `on_rows` after each finished row of codes.

    request: index in the list of requests. rows: finished, of grid, in the wave that is being drawn. share: of all the
    request's candidates, 0 .. 1. pictures: makes the first candidates of the wave, n at most, as PIL images whose
    unfinished rows are blank; costs a decoding each time.
    """

    request: int
    rows: int
    grid: int
    share: float
    pictures: Callable[[], list[Image.Image]]


def check(request: Request, config: TransformerConfig, *, can_rank: bool, can_guide: bool) -> None:
    """Refuses what this model cannot draw.

    Raises:
      UserError: one sentence with the name of the argument, its range and what came.
    """
    grid, vocab = config.grid, config.image_vocab
    caption = request.caption
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION:
        got = f"{len(caption)} characters" if isinstance(caption, str) else repr(caption)
        raise UserError(f"caption must be a text of at most {MAX_CAPTION} characters, got {got}")
    if any("\ud800" <= character <= "\udfff" for character in caption):  # a command's bytes that are no UTF-8, too
        raise UserError(f"caption must be Unicode text, got {ascii(caption[:40])} with half a surrogate pair")
    _whole("n", request.n, 1, MAX_CANDIDATES)
    if request.best_of is not None:
        _whole("best_of", request.best_of, request.n, MAX_CANDIDATES, lowest="n")
        if not can_rank:
            raise UserError("best_of needs a CLIP to rank with: train one and put its workdir into the model's as clip")
    _whole("seed", request.seed, 0, MAX_SEED - request.candidates, highest="2**32 - candidates")
    _number("temperature", request.temperature, least=TEMPERATURES[0], most=TEMPERATURES[1])
    if request.top_k is not None:
        _whole("top_k", request.top_k, 1, vocab)
    if request.top_p is not None:
        _number("top_p", request.top_p, above=0, most=1)
    _number("guidance", request.guidance, least=0, most=MAX_GUIDANCE)
    if request.guidance != 1 and not can_guide:
        raise UserError(
            "guidance must be 1 for a model that was trained without dropping captions (config.data.caption_dropout), "
            f"got {request.guidance}"
        )
    if request.keep_rows is not None:
        _whole("keep_rows", request.keep_rows, 0, grid)
        if request.image is None:
            raise UserError(f"keep_rows needs an image to keep rows of, got {request.keep_rows} without one")


def _whole(name: str, value, least: int, most: int, *, lowest: str = "", highest: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        bounds = f"{f'{lowest} = ' * bool(lowest)}{least} .. {f'{highest} = ' * bool(highest)}{most}"
        raise UserError(f"{name} must be a whole number in {bounds}, got {value!r}")


def _number(name: str, value, *, above: float | None = None, least: float | None = None, most: float | None = None):
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    enough = good and (above is None or value > above) and (least is None or value >= least)
    if enough and (most is None or value <= most):
        return
    lower = f"above {above}" if above is not None else f"at least {least}"
    raise UserError(f"{name} must be {lower}{'' if most is None else f' and at most {most}'}, got {value!r}")
