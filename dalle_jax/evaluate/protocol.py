"""What an evaluation is: every value that a score depends on, in a few dataclasses that a report can hold.

`configs/evaluate.py` names the published protocols in these words, the flags of `dalle-jax evaluate` fill in the same
ones, and a report gives them back. Knows which values are possible; does nothing with them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dalle_jax.errors import UserError

RESIZES = ("pytorch", "clean", "tf1", "dm-gan", "dm-gan-score")  # functions of `preprocess`
CROPS = ("none", "centre")
FEATURES = ("inception", "clip")
POOLS = ("", "fid", "torchvision")


@dataclasses.dataclass(frozen=True)
class Measure:
    """How two sets of pictures are compared, whoever made them.

    features: 'inception', the network of published scores, or 'clip', whose numbers compare with each other only.
    pools: which Inception it has to be, as `models.inception` names it; '' takes either.
    resize: to the network's size, a function of `preprocess`. crop: 'centre' is the largest square about the centre;
    reference_crop: that of the reference, '' for the same. side: then cropped pictures are brought to this side in
    pixels, so that a radius of blur means the same in both sets; 0 leaves them. blur: radii in pixels, each gives one
    set of scores. splits: of the Inception score. score_pools, score_resize: of the network whose classes give it, ''
    for the same as `pools` and `resize`. candidates: captions that R-precision chooses among. seed: of draws, splits
    and subsets.
    """

    features: str = "inception"
    pools: str = ""
    resize: str = "pytorch"
    crop: str = "none"
    reference_crop: str = ""
    side: int = 0
    blur: tuple[float, ...] = (0.0,)
    splits: int = 10  # Salimans et al. 2016
    score_pools: str = ""
    score_resize: str = ""
    candidates: int = 100  # Xu et al. 2018
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "blur", tuple(map(float, self.blur)))
        _one_of("features", self.features, FEATURES)
        _one_of("pools", self.pools, POOLS)
        _one_of("resize", self.resize, RESIZES)
        _one_of("score_pools", self.score_pools, POOLS)
        _one_of("score_resize", self.score_resize, ("", *RESIZES))
        _one_of("crop", self.crop, CROPS)
        _one_of("reference_crop", self.reference_crop, ("", *CROPS))
        if not self.blur or not all(0 <= radius < math.inf for radius in self.blur):
            raise ValueError(f"blur must be one or more radii of 0 or more, got {self.blur}")
        if len(set(self.blur)) != len(self.blur):
            raise ValueError(f"blur must name every radius once, got {self.blur}")
        _at_least("side", self.side, 0)
        _at_least("splits", self.splits, 1)
        _at_least("candidates", self.candidates, 2)
        _at_least("seed", self.seed, 0)
        if self.side and "centre" not in (self.crop, self.reference_crop):
            raise ValueError(f"side needs crop = 'centre', as it is that of a square, got side {self.side} without")


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which captions are drawn, and how: one picture each.

    count: captions drawn by the seed without one twice, all of them for 0. unique: of equal captions only the first
    counts. best_of: candidates of which CLIP chooses one, 0 for none. seed: of the choice, and of the first picture;
    picture i has the seed `seed + i * max(best_of, 1)`. temperature, guidance, top_k (0: all), top_p: as in
    `sample.request`; weights: as in `Pipeline.load`. clip: model directory of the CLIP that chooses, '' for the
    one in the model's own folder. shard_size: pictures in a tar file.
    """

    count: int = 0
    unique: bool = False
    best_of: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    weights: str = "model"
    clip: str = ""
    seed: int = 0
    shard_size: int = 256

    def __post_init__(self):
        for name, least in (("count", 0), ("best_of", 0), ("top_k", 0), ("seed", 0), ("shard_size", 1)):
            _at_least(name, getattr(self, name), least)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Near duplicates between the reference and a training set, by CLIP.

    source: the training pictures, '' to look for none. least: cosine from which on two pictures count as the same;
    remove: take those out of the reference.
    """

    source: str = ""
    least: float = 0.95
    remove: bool = False

    def __post_init__(self):
        if not -1 <= self.least <= 1:
            raise ValueError(f"overlap.least must be a cosine, -1 .. 1, got {self.least}")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation as a whole.

    protocol: its name in reports, '' for one that somebody put together. departures: what is not as the protocol has
    it, in words. pictures: source of the pictures that are judged, '' where `draw` says how they are made. source: of
    the captions that are drawn. reference: source or .npz of statistics, '' for the pictures of `source`.
    reference_exactly: readable pictures that the reference must have, 0 for any number. count, reference_count:
    pictures that are taken of each set by the seed, 0 for all. weights: path of Inception v3. score_weights: of the one
    whose classes give the Inception score, '' for the same. clip: model directory of a CLIP, '' for none.
    """

    protocol: str = ""
    departures: tuple[str, ...] = ()
    pictures: str = ""
    source: str = ""
    reference: str = ""
    reference_exactly: int = 0
    reference_count: int = 0
    count: int = 0
    weights: str = ""
    score_weights: str = ""
    clip: str = ""
    draw: Draw | None = None
    measure: Measure = dataclasses.field(default_factory=Measure)
    overlap: Overlap = dataclasses.field(default_factory=Overlap)

    def __post_init__(self):
        object.__setattr__(self, "departures", tuple(self.departures))
        for name in ("reference_exactly", "reference_count", "count"):
            _at_least(name, getattr(self, name), 0)
        if (self.draw is None) != bool(self.pictures):
            raise ValueError("an evaluation either draws pictures or is given some")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str) -> "Evaluation":
        """From a config or a report, named `where` in errors.

        Raises:
          UserError: a value that cannot be.
        """
        values = dict(values)
        parts = {"measure": Measure, "overlap": Overlap, "draw": Draw}
        try:
            for name, part in parts.items():
                if isinstance(values.get(name), Mapping):
                    values[name] = part(**values[name])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"expected a possible evaluation in {where}, got one where {error}") from error


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
