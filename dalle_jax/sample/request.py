"""What one caller wants drawn, and what it sees while that is drawn."""

import dataclasses

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Request:
    """One caption and how to draw it.

    n: pictures returned. best_of: candidates drawn and ranked by CLIP, at least n; None: n drawn, not ranked.
    seed: candidate m has seed + m. guidance: 1 for none. image, keep_rows: complete this picture from its top rows.
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


@dataclasses.dataclass(frozen=True)
class Preview:
    """After each finished row of codes. request: index into the list given to draw; rows: finished, of grid."""

    request: int
    rows: int
    grid: int

    def pictures(self) -> list[Image.Image]:
        """The first n candidates, unfinished rows blank; decoded when asked."""
        raise NotImplementedError
