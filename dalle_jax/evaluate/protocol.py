"""The values that the scores of an evaluation depend on, in a few dataclasses that a report can hold.

`configs/evaluate.py` names the published protocols in these words, the flags of `dalle-jax evaluate` fill in the same
ones, and a report gives them back. Knows which values are possible, and does nothing with them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.evaluate.preprocess import CROPS, RESIZES
from dalle_jax.models import inception
from dalle_jax.sample.request import MAX_CANDIDATES, MAX_SEEDS
from dalle_jax.train.settings import Processes

FEATURES = ("inception", "clip")
MAX_SIDE = 4_096  # pixels, of an image before it is blurred
MAX_BLUR = 1_000  # pixels
MAX_PICTURES = 10**10  # of a set
# What may lie elsewhere when an evaluation is repeated.
PLACES = ("source", "reference", "pictures", "weights", "score_weights", "clip", "draw.clip", "overlap.source")


PROCESSES = Processes(hang_seconds=600)  # a process may be silent longer than in training: a set is one phase


def check_texts(values: object, *names: str) -> None:
    """Raises UserError unless these fields are texts, or None."""
    for name in names:
        if not isinstance(value := getattr(values, name), str | None):
            raise UserError(f"expected {name} to be a text or None, got {value!r}: write a text")


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The way two sets of pictures are compared, whoever made them.

    features: 'inception', the network of published scores, or 'clip', whose numbers compare with each other only.
    pools: which Inception it has to be, as `models.inception` names it; None takes either.
    resize: to the network's size, a function of `preprocess`. crop: 'center' is the largest square about the center;
    reference_crop: that of the reference, None for the same. side: then cropped pictures are brought to this side in
    pixels, so that a radius of blur means the same in both sets; None leaves them. blur: radii in pixels, each gives
    one set of scores. splits: of the Inception score. score_pools, score_resize: of the network whose classes give it,
    None for the same as `pools` and `resize`. candidates: captions that R-precision chooses among. seed: of draws,
    splits and subsets.
    """

    features: str = "inception"
    pools: str | None = None
    resize: str = "pytorch"
    crop: str = "none"
    reference_crop: str | None = None
    side: int | None = None
    blur: tuple[float, ...] = (0.0,)
    splits: int = 10  # Salimans et al. 2016
    score_pools: str | None = None
    score_resize: str | None = None
    candidates: int = 100  # Xu et al. 2018
    seed: int = 0

    def __post_init__(self):
        check_choice("features", self.features, FEATURES)
        check_choice("resize", self.resize, RESIZES)
        check_choice("crop", self.crop, CROPS)
        check_choice("pools", self.pools, inception.CLASSES, optional=True)
        check_choice("score_pools", self.score_pools, inception.CLASSES, optional=True)
        check_choice("score_resize", self.score_resize, RESIZES, optional=True)
        check_choice("reference_crop", self.reference_crop, CROPS, optional=True)
        for radius in self.blur:
            check_number("blur", radius, min=0, max=MAX_BLUR)
        object.__setattr__(self, "blur", tuple(map(float, self.blur)))
        if not self.blur or len(set(self.blur)) != len(self.blur):
            raise UserError(f"expected one or more different radii of blur, got {self.blur}: name each once")
        check_number("side", self.side, min=1, max=MAX_SIDE, whole=True, optional=True)
        check_number("splits", self.splits, min=1, max=MAX_PICTURES, whole=True)
        check_number("candidates", self.candidates, min=2, max=MAX_PICTURES, whole=True)
        check_number("seed", self.seed, min=0, max=MAX_SEEDS - 1, whole=True)
        if self.side and "center" not in (self.crop, self.reference_crop):
            raise UserError(f"expected crop = 'center' with side = {self.side}, that of a square, got none: add it")

    @property
    def crops(self) -> tuple[str, str]:
        """The crop of the pictures, and that of the reference."""
        return self.crop, self.crop if self.reference_crop is None else self.reference_crop


@dataclasses.dataclass(frozen=True)
class Draw:
    """The captions that are drawn, one picture each, and the way they are drawn.

    count: captions chosen by the seed without one twice; None takes all of them. unique: of equal captions only the
    first counts. best_of: candidates of which CLIP chooses one, None for no ranking. seed: of the choice, and of the
    first picture; picture i has the seed `seed + i * (best_of or 1)`. temperature, guidance, top_k, top_p: of the
    generator, which checks them; weights: as in `Pipeline.load`. clip: model directory of the CLIP that chooses, None
    for the one in the model's folder. shard_size: pictures in a tar file.
    """

    count: int | None = None
    unique: bool = False
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    weights: str = "model"
    clip: str | None = None
    seed: int = 0
    shard_size: int = 256

    def __post_init__(self):
        check_texts(self, "weights", "clip")
        check_number("draw.count", self.count, min=2, max=MAX_PICTURES, whole=True, optional=True)
        check_number("draw.best_of", self.best_of, min=1, max=MAX_CANDIDATES, whole=True, optional=True)
        check_number("draw.seed", self.seed, min=0, max=MAX_SEEDS - 1, whole=True)
        check_number("draw.shard_size", self.shard_size, min=1, max=MAX_PICTURES, whole=True)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Near duplicates between the reference and a training set, by CLIP.

    source: the training pictures, None to look for no overlap. min_cosine: cosine from which on two pictures count as
    the same. remove: take those out of the reference.
    """

    source: str | None = None
    min_cosine: float = 0.95
    remove: bool = False

    def __post_init__(self):
        check_number("overlap.min_cosine", self.min_cosine, min=-1, max=1)
        check_texts(self, "source")


# What must not have changed when a report is repeated: where the report has the sha256, and what it is of.
DIGESTS = {
    "weights": "weights of the network",
    "scored_by.digest": "weights of the Inception score's network",
    "clip.digest": "CLIP",
    "drawn.checkpoint": "checkpoint that draws",
    "drawn.ranked_by": "CLIP that chooses",
    "drawn.captions_sha256": "captions of the source",
    "reference.sha256": "pictures of the reference",
    "pictures.sha256": "pictures",
}
COMPUTED = ("drawn.captions_sha256", "reference.sha256", "pictures.sha256")  # those that take more than opening files


@dataclasses.dataclass(frozen=True)
class Expected:
    """The digests that an evaluation has to find again when it repeats a report.

    report: its path. digests: sha256 by the names of DIGESTS, None for what it did not use. scores, versions: those of
    the report, to compare with.
    """

    report: str
    digests: dict[str, str | None]
    scores: dict[str, Any]
    versions: dict[str, str]

    def check(self, name: str, digest: str | None) -> None:
        """Raises UserError unless the digest is that of the report."""
        if self.digests[name] != digest:
            was, got = (f"{sha256[:16]}..." if sha256 else "none" for sha256 in (self.digests[name], digest))
            raise UserError(
                f"expected the {DIGESTS[name]} of {self.report}, sha256 {was}, got {got}: give the same, or the config "
                "of a protocol instead of this report"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation as a whole.

    protocol: its name in reports, None for one that somebody put together. departures: what is not as the protocol has
    it, in words. pictures: source of the pictures that are judged, None where `draw` says how they are made. source: of
    the captions that are drawn. reference: source or .npz of statistics, None for the pictures of `source`.
    reference_exactly: readable pictures that the reference must have, None for any number. count, reference_count:
    pictures that are taken of each set by the seed, None for all. weights: path of Inception v3. score_weights: of the
    one whose classes give the Inception score, None for the same. clip: model directory of a CLIP, None for none.
    measure: how the sets are compared. expected: digests of the report that is repeated, None where none is.
    """

    protocol: str | None = None
    departures: tuple[str, ...] = ()
    pictures: str | None = None
    source: str | None = None
    reference: str | None = None
    reference_exactly: int | None = None
    reference_count: int | None = None
    count: int | None = None
    weights: str | None = None
    score_weights: str | None = None
    clip: str | None = None
    draw: Draw | None = None
    measure: Metrics = dataclasses.field(default_factory=Metrics)
    overlap: Overlap = dataclasses.field(default_factory=Overlap)
    expected: Expected | None = None

    def __post_init__(self):
        object.__setattr__(self, "departures", tuple(self.departures))
        check_texts(self, "protocol", "pictures", "source", "reference", "weights", "score_weights", "clip")
        for name in ("reference_exactly", "reference_count", "count"):
            check_number(name, getattr(self, name), min=2, max=MAX_PICTURES, whole=True, optional=True)
        if (self.draw is None) == (self.pictures is None):
            raise UserError("expected either a transformer that draws or --pictures SOURCE, got both or neither")

    def to_json(self) -> dict[str, Any]:
        """For a report, which has the digests elsewhere."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "expected"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str) -> "Evaluation":
        """From a config or a report, named `where` in errors.

        Raises:
          UserError: a value that cannot be.
        """
        values = dict(values)
        try:
            for name, part in (("measure", Metrics), ("overlap", Overlap), ("draw", Draw)):
                if isinstance(values.get(name), Mapping):
                    values[name] = part(**values[name])
            return cls(**values)
        except TypeError as error:
            raise UserError(f"expected the values of an evaluation in {where}, got one where {error}") from error
