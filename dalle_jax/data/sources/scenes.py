"""Built-in generated scenes: plain colored shapes on white and the captions that describe them.

Holds the grammar of the captions, the drawing of a scene, and THE split: which color-shape pairs, relations and
combinations never occur in training, so that a correct picture of one is zero-shot. `scene_checker` judges pictures.

A `Scene` is what a caption says and no more: a size that the caption does not name is None, and the picture may have
any. Everything is a function of (stream name, index) through a counter-based generator, so record i is the same in any
order, process and image size. Lengths are fractions of the image's side; y points down.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re

import numpy as np

from dalle_jax.data.record import Record
from dalle_jax.data.sources.shapes import SHAPES, coverage
from dalle_jax.errors import UserError

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (250, 220, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
}
SIZES = ("small", "large")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(OPPOSITE)

RADIUS = {"small": (0.145, 0.16), "large": (0.205, 0.22)}  # half the side of the box that holds the shape
MARGIN = 1 / 64  # between any box and the border: half a pixel at 32, the reach of the anti-aliasing
GAP = 1 / 16  # at least this between the boxes of two objects: 2 pixels at 32, 4 at 64
SLANT = 0.5  # the centers of two objects differ across the relation's axis by at most this times along it

ONE_OBJECT_WORDINGS: tuple[str, ...] = (
    "{a}",
    "there is {a}",
    "this is {a}",
    "a picture of {a}",
    "a drawing of {a}",
    "{a} on a white background",
)
TWO_OBJECT_WORDINGS: tuple[str, ...] = (
    "{a} {relation} {b}",
    "{a} is {relation} {b}",
    "there is {a} {relation} {b}",
    "a picture of {a} {relation} {b}",
)

# The sizes a caption names, equally likely: one object 1/3 none; two objects 1/3 none, 1/3 one of them, 1/3 both.
_ONE_SIZES: tuple[tuple[str | None, ...], ...] = ((None,), ("small",), ("large",))
_ONE_OF_TWO = tuple(itertools.chain.from_iterable(((size, None), (None, size)) for size in SIZES))
_TWO_SIZES: tuple[tuple[str | None, ...], ...] = (
    ((None, None),) * 4 + _ONE_OF_TWO + tuple(itertools.product(SIZES, repeat=2))
)

# THE split. Each held-out pair leaves at least three shapes of its color and four colors of its shape.
UNSEEN_PAIRS = frozenset(
    {("red", "square"), ("green", "star"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "square")}
)
UNSEEN_RELATIONS = frozenset(  # shape, relation, shape; held out together with the opposite wording
    {
        ("circle", "above", "star"),
        ("square", "above", "circle"),
        ("star", "above", "triangle"),
        ("triangle", "left of", "square"),
        ("star", "left of", "circle"),
    }
)
UNSEEN_COMBINATION_EVERY = 10  # one in ten of the remaining combinations of two objects, by hash

LENGTHS = {"train": 1_000_000, "val": 2_000}
EVALUATION_SETS = ("one_seen", "one_unseen", "two_unseen_combination", "two_unseen_pair", "two_unseen_relation")
PARTS = ("tune", "report")
_ONE_OBJECT_SHARE = 0.4  # of the training records; two objects are harder and get more


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; `size` is None if the caption does not name it."""

    shape: str
    color: str
    size: str | None = None

    def __str__(self):
        words = f"{self.size} {self.color} {self.shape}" if self.size else f"{self.color} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a caption: one object, or two of which the first is `relation` the second."""

    objects: tuple[Object, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Placed:
    """An object as drawn: its box is centered on (x, y) with half side `radius`, in fractions of the side."""

    object: Object  # its size is never None
    x: float
    y: float
    radius: float


# --- words


def caption(scene: Scene, *, wording: int = 0) -> str:
    """The scene in words; `wording` indexes ONE_OBJECT_WORDINGS or TWO_OBJECT_WORDINGS, modulo their number."""
    if scene.relation is None:
        return ONE_OBJECT_WORDINGS[wording % len(ONE_OBJECT_WORDINGS)].format(a=scene.objects[0])
    template = TWO_OBJECT_WORDINGS[wording % len(TWO_OBJECT_WORDINGS)]
    return template.format(a=scene.objects[0], b=scene.objects[1], relation=scene.relation)


@functools.cache
def _patterns() -> tuple[re.Pattern, ...]:
    def of_object(name):
        size, color, shape = "|".join(SIZES), "|".join(COLORS), "|".join(SHAPES)
        return rf"an? (?:(?P<{name}_size>{size}) )?(?P<{name}_color>{color}) (?P<{name}_shape>{shape})"

    relation = rf"(?:to the )?(?P<relation>{'|'.join(RELATIONS)})"
    parts = {"a": of_object("a"), "b": of_object("b"), "relation": relation}
    return tuple(re.compile(wording.format(**parts)) for wording in (*ONE_OBJECT_WORDINGS, *TWO_OBJECT_WORDINGS))


def parse(text: str) -> Scene | None:
    """The scene that a caption of this grammar describes, whatever its wording and case; None for any other text."""
    words = " ".join(text.lower().split()).rstrip(". ")
    for pattern in _patterns():
        if found := pattern.fullmatch(words):
            group = found.groupdict()
            names = ("a", "b") if group.get("relation") else ("a",)
            objects = (Object(group[f"{n}_shape"], group[f"{n}_color"], group[f"{n}_size"]) for n in names)
            return Scene(tuple(objects), group.get("relation"))
    return None


# --- the split


def canonical(scene: Scene) -> Scene:
    """The same scene described with 'above' or 'left of': 'a below b' is the same picture as 'b above a'."""
    if scene.relation in ("below", "right of"):
        return Scene(scene.objects[::-1], OPPOSITE[scene.relation])
    return scene


def _stable(text: str) -> int:
    """64 bits of SHA-256, the same on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _without_sizes(scene: Scene) -> Scene:
    return Scene(tuple(dataclasses.replace(o, size=None) for o in canonical(scene).objects), canonical(scene).relation)


def unseen_pairs(scene: Scene) -> int:
    """The number of objects of a color-shape pair that training never shows."""
    return sum((o.color, o.shape) in UNSEEN_PAIRS for o in scene.objects)


def unseen_relation(scene: Scene) -> bool:
    """Whether training never shows these two shapes in this relation, whatever their colors."""
    upper = canonical(scene)
    return (
        upper.relation is not None
        and (upper.objects[0].shape, upper.relation, upper.objects[1].shape) in UNSEEN_RELATIONS
    )


def unseen_combination(scene: Scene) -> bool:
    """Whether this combination of two pairs and a relation is held out, by its hash."""
    if scene.relation is None:
        return False
    return _stable(f"combination: {caption(_without_sizes(scene))}") % UNSEEN_COMBINATION_EVERY == 0


def in_training(scene: Scene) -> bool:
    """Whether the training split may contain the scene."""
    return not (unseen_pairs(scene) or unseen_relation(scene) or unseen_combination(scene))


@functools.cache
def _pool(name: str) -> tuple[Scene, ...]:
    """All canonical scenes without sizes of 'one_train', 'two_train' or an evaluation set.

    Two objects are never of the same color and shape: a caption could not tell them apart.
    """
    objects = [Object(shape, color) for shape in SHAPES for color in COLORS]
    pairs = [(a, b) for a, b in itertools.product(objects, repeat=2) if a != b]
    one = [Scene((a,)) for a in objects]
    two = [Scene(pair, relation) for relation in ("above", "left of") for pair in pairs]
    belongs = {
        "one_train": in_training,
        "one_seen": in_training,
        "one_unseen": unseen_pairs,
        "two_train": in_training,
        "two_unseen_combination": lambda s: not unseen_pairs(s) and not unseen_relation(s) and unseen_combination(s),
        "two_unseen_pair": lambda s: unseen_pairs(s) == 1 and not unseen_relation(s),
        "two_unseen_relation": lambda s: not unseen_pairs(s) and unseen_relation(s),
    }[name]
    return tuple(filter(belongs, one if name.startswith("one") else two))


def _describe(scene: Scene, sizes: tuple[str | None, ...], *, swap: bool) -> Scene:
    """The canonical scene with these sizes, described from its second object if `swap`."""
    objects, relation = scene.objects, scene.relation
    if swap and relation is not None:
        objects, relation = objects[::-1], OPPOSITE[relation]
    return Scene(tuple(Object(o.shape, o.color, size) for o, size in zip(objects, sizes, strict=True)), relation)


# --- drawing

_INK = {name: 255.0 - np.array(value) for name, value in COLORS.items()}  # what the color takes away from white


def place(scene: Scene, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Choose what the scene leaves open: unnamed sizes, exact radii and places, uniformly among those that fit.

    Boxes keep MARGIN to the border and GAP to each other. Takes eight numbers from `rng`, whatever the scene.
    """
    pick = rng.random(8).tolist()

    def between(low, high, u):
        return low + (high - low) * u

    objects, radii = [], []
    for o, size_u, radius_u in zip(scene.objects, pick[0:2], pick[2:4], strict=False):  # one object leaves some unused
        size = o.size or SIZES[int(size_u * len(SIZES))]
        objects.append(Object(o.shape, o.color, size))
        radii.append(between(*RADIUS[size], radius_u))

    if scene.relation is None:
        (r,) = radii
        x, y = (between(MARGIN + r, 1 - MARGIN - r, u) for u in pick[4:6])
        return (Placed(objects[0], x, y, r),)

    first, second = (0, 1) if scene.relation in ("above", "left of") else (1, 0)  # top to bottom, or left to right
    slack = 1 - 2 * MARGIN - 2 * sum(radii) - GAP  # divided among before, between and behind the two
    before, until = sorted(pick[4:6])
    along = [0.0, 0.0]
    along[first] = MARGIN + slack * before + radii[first]
    along[second] = 1 - MARGIN - slack * (1 - until) - radii[second]
    across = [0.0, 0.0]
    low, high = MARGIN + radii[first], 1 - MARGIN - radii[first]
    across[first] = between(low, high, pick[6])
    reach = SLANT * (along[second] - along[first])
    low = max(MARGIN + radii[second], across[first] - reach)
    high = min(1 - MARGIN - radii[second], across[first] + reach)
    across[second] = between(low, high, pick[7])
    xs, ys = (across, along) if scene.relation in ("above", "below") else (along, across)
    return tuple(Placed(o, x, y, r) for o, x, y, r in zip(objects, xs, ys, radii, strict=True))


def render(placed: tuple[Placed, ...], *, image_size: int) -> np.ndarray:
    """The picture, uint8 [image_size, image_size, 3]. The objects must not overlap."""
    image_uint8 = np.full((image_size, image_size, 3), 255, np.uint8)
    for item in placed:
        x, y, radius = item.x * image_size, item.y * image_size, item.radius * image_size
        left, top = (max(0, math.floor(center - radius - 0.5)) for center in (x, y))
        right, bottom = (min(image_size, math.ceil(center + radius + 0.5)) for center in (x, y))
        columns, rows = np.arange(left, right), np.arange(top, bottom)
        share = coverage(item.object.shape, x=x, y=y, radius=radius, columns=columns, rows=rows)
        image_uint8[top:bottom, left:right] = 255.5 - share[..., None] * _INK[item.object.color]
    return image_uint8


def draw(scene: Scene, rng: np.random.Generator, *, image_size: int = 32) -> np.ndarray:
    """One picture of the scene at a random place, uint8 [image_size, image_size, 3]."""
    return render(place(scene, rng), image_size=image_size)


# --- records


@functools.cache
def _stream(name: str) -> int:
    return _stable(f"stream: {name}")


def _generator(stream: str, index: int) -> np.random.Generator:
    """The counter-based generator of one record: cheap to make and independent of every other record."""
    return np.random.Generator(np.random.Philox(key=(_stream(stream), index)))


def _sample(rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene of the training split, and its caption."""
    kind, which, sizes, swap, wording = rng.random(5).tolist()
    if kind < _ONE_OBJECT_SHARE:
        pool, named, wordings = _pool("one_train"), _ONE_SIZES, ONE_OBJECT_WORDINGS
    else:
        pool, named, wordings = _pool("two_train"), _TWO_SIZES, TWO_OBJECT_WORDINGS
    scene = _describe(pool[int(which * len(pool))], named[int(sizes * len(named))], swap=swap < 0.5)
    return scene, caption(scene, wording=int(wording * len(wordings)))


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The source of one split. Nothing is stored: record i is made when it is read."""

    split: str
    image_size: int = 32

    @property
    def name(self) -> str:
        return f"scenes:{self.split}@{self.image_size}"

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def __getitem__(self, index: int) -> Record:
        rng, scene, text = self._begin(index)
        return Record(
            key=f"{self.split}-{index:07d}", image=draw(scene, rng, image_size=self.image_size), captions=(text,)
        )

    def captions_of(self, index: int) -> tuple[str, ...]:
        return (self._begin(index)[2],)

    def _begin(self, index: int) -> tuple[np.random.Generator, Scene, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has records 0 .. {len(self) - 1}, got {index}")
        rng = _generator(self.split, index)
        return rng, *_sample(rng)


def open_scenes(split: str) -> Scenes:
    """The source 'scenes:SPLIT' or 'scenes:SPLIT@SIZE': SPLIT train or val, SIZE the side in pixels (32 if left out).

    Raises:
      UserError: an unknown split, or a size that is not a whole number of at least 24.
    """
    name, at, size = split.partition("@")
    if name not in LENGTHS:
        raise UserError(f"expected scenes:train or scenes:val, got scenes:{split}: choose one of {', '.join(LENGTHS)}")
    if at and not (size.isdecimal() and int(size) >= 24):
        raise UserError(f"expected a side of at least 24 pixels after '@', got {size!r}: write e.g. scenes:{name}@64")
    return Scenes(name, int(size) if at else 32)


@functools.cache
def _captions(set_name: str, part: str) -> tuple[tuple[str, Scene], ...]:
    """Every caption of a part of an evaluation set, in the order in which they are used."""
    if set_name not in EVALUATION_SETS or part not in PARTS:
        raise ValueError(f"expected one of {EVALUATION_SETS} and one of {PARTS}, got {set_name!r}, {part!r}")
    one = set_name.startswith("one")
    scene_of, weights = {}, {}
    for scene in _pool(set_name):
        for sizes, swap in itertools.product(_ONE_SIZES if one else _TWO_SIZES, (False,) if one else (False, True)):
            described = _describe(scene, sizes, swap=swap)
            for wording in range(len(ONE_OBJECT_WORDINGS if one else TWO_OBJECT_WORDINGS)):
                text = caption(described, wording=wording)
                decided_by = text if one else caption(scene)
                if (_stable(f"part: {decided_by}") % 3 == 0) == (part == "tune"):
                    scene_of[text] = described
                    weights[text] = weights.get(text, 0) + 1
    # A weighted shuffle (the smallest of exponential waiting times first): sizes are named as often as in training.
    waiting = _generator(f"{set_name} {part}", 0).exponential(size=len(scene_of)) / np.array(list(weights.values()))
    items = tuple(scene_of.items())
    return tuple(items[i] for i in np.argsort(waiting))


def captions(set_name: str, part: str, n: int) -> list[tuple[str, Scene]]:
    """The first `n` captions of an evaluation set and their scenes; a longer list begins with the shorter one.

    Part 'tune' is for choosing a temperature, 'report' for the figures that are published; no caption is in both.
    With two objects no combination is in both either, whatever its wording; with one object the color-shape pairs are
    necessarily shared. Captions do not repeat before the part is exhausted; with one object there are few, and then the
    list begins again.
    """
    available = _captions(set_name, part)
    return [available[i % len(available)] for i in range(n)]


def true_pictures(set_name: str, part: str, n: int, *, image_size: int = 32) -> np.ndarray:
    """A correct picture for each of `captions(set_name, part, n)`: uint8 [n, image_size, image_size, 3]."""
    images = np.empty((n, image_size, image_size, 3), np.uint8)
    for i, (_, scene) in enumerate(captions(set_name, part, n)):
        images[i] = draw(scene, _generator(f"{set_name} {part} pictures", i), image_size=image_size)
    return images
