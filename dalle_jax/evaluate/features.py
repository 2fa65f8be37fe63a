"""Features of a source's pictures by a network, in batches over all devices of this process.

Keeps every picture that decodes, in the source's order, counts those that do not, and pads the last batch instead of
dropping it. Knows nothing of distances.

Dimensions: B batch, H height, W width, N pictures, F features, V classes.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures

import jax
import numpy as np

from dalle_jax import model_dir, sharding
from dalle_jax.checkpoint import digest
from dalle_jax.convert.inception import load_published
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.record import Dropped, Source
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError
from dalle_jax.evaluate import preprocess, progress
from dalle_jax.mesh import local_mesh
from dalle_jax.models import Model, Params, inception

BATCH = 32  # pictures a device
LISTS = {"keys": "key", "rows": "row", "captions": "caption", "hashes": "hash", "sizes": "size"}  # of a set, of one

_features = jax.jit(Model.apply, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pictures are brought to a network: crop, side, blur and resize, as `protocol.Measure` explains them."""

    resize: str = "pytorch"
    crop: str = "none"
    side: int = 0
    blur: float = 0.0

    def framed(self, image_uint8: np.ndarray) -> np.ndarray:
        """Cropped and blurred, still uint8 [H, W, 3]."""
        image_uint8 = preprocess.CROPS[self.crop](image_uint8)
        if self.side and self.crop != "none":
            image_uint8 = center_crop(image_uint8, self.side)
        return preprocess.blurred(image_uint8, self.blur)

    def about(self) -> dict[str, str]:
        """The values as words of a statistics file."""
        return {"resize": self.resize, "crop": self.crop, "side": str(self.side), "blur": f"{self.blur:g}"}

    def __call__(self, image_uint8: np.ndarray) -> np.ndarray:
        """For Inception: float32 [SIDE, SIDE, 3]."""
        return preprocess.RESIZES[self.resize](self.framed(image_uint8))


@dataclasses.dataclass(frozen=True)
class Found:
    """Features of the pictures of a source that could be read, in the source's order.

    features_NF: float32; logits_NV: float32, V = 0 where the network has none. keys: their names; rows: their places in
    the source; captions: the first of each, '' for none; hashes: sha256 of each picture as it was stored; sizes: height
    and width of each in pixels. dropped: reason -> count.
    """

    features_NF: np.ndarray
    logits_NV: np.ndarray
    keys: list[str]
    rows: list[int]
    captions: list[str]
    hashes: list[str]
    sizes: list[tuple[int, int]]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def digest(self) -> str:
        """sha256 of all pictures in their order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def without(self, rows: Collection[int]) -> "Found":
        """The same set without the pictures in these places of the source."""
        kept = [i for i, row in enumerate(self.rows) if row not in rows]
        lists = {name: [getattr(self, name)[i] for i in kept] for name in LISTS}
        return dataclasses.replace(self, features_NF=self.features_NF[kept], logits_NV=self.logits_NV[kept], **lists)

    @classmethod
    def joined(cls, parts: Sequence["Found"]) -> "Found":
        """Consecutive parts of a source as one."""
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("features_NF", "logits_NV")}
        lists = {name: [value for part in parts for value in getattr(part, name)] for name in LISTS}
        dropped = sum((collections.Counter(part.dropped) for part in parts), collections.Counter())
        return cls(**arrays, **lists, dropped=dict(dropped))


class Extractor:
    """Inception v3 on all devices of this process. Make one with `Extractor.load`.

    Attributes:
      network: its name in reports. digest: sha256 (hex) of its parameters. features: length of a vector. batch:
        pictures of one call.
    """

    def __init__(self, model: Model, params: Params, *, batch: int | None = None):
        mesh = local_mesh()
        self.model, self.digest = model, digest.of_tree(params)
        config = model.config
        self.network = f"inception-{config.pools}" + (f"-{config.features}" if config.narrow > 1 else "")
        self.features, self.classes = config.features, config.classes
        self.batch = (batch or BATCH) * sharding.batch_ways(mesh)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._place = sharding.batch_sharding(mesh)

    @classmethod
    def load(cls, path: str | os.PathLike, *, batch: int | None = None) -> "Extractor":
        """The network of a model directory, or straight from a published file (.pth, .safetensors).

        batch: pictures a device and call; default: BATCH.

        Raises:
          UserError: nothing there, or the weights of something else.
        """
        if not pathlib.Path(path).is_dir():
            config, params = load_published(path)
            return cls(inception.model(config), params, batch=batch)
        found = model_dir.load(path, name="inception")
        return cls(found.model, found.params, batch=batch)

    def prepared(self, image_uint8: np.ndarray, prepare: Preparation) -> np.ndarray:
        """What the network reads of a picture uint8 [H, W, 3]."""
        return prepare(image_uint8)

    def __call__(self, x_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `prepared` makes of pictures -> features [N, F] and logits [N, V]; N at most `batch`."""
        count = len(x_NHWC)
        if count < self.batch:  # one compiled shape
            x_NHWC = np.concatenate([x_NHWC, np.zeros((self.batch - count, *x_NHWC.shape[1:]), x_NHWC.dtype)])
        pool3_BF, logits_BV = _features(self.model, self._params, jax.device_put(x_NHWC, self._place))
        return np.asarray(pool3_BF)[:count], np.asarray(logits_BV)[:count]

    def of_source(self, source: Source, *, prepare: Preparation, rows=None, tell: str = "") -> Found:
        """Features of these rows of a source (default: all). tell: what the progress on stderr is named, '' for none.

        Raises:
          UserError: no picture of the source can be read.
        """
        rows = range(len(source)) if rows is None else rows
        with progress.bar(len(rows), tell) as bar:
            found = self.of_rows(source, prepare=prepare, rows=rows, advance=bar.update)
        return refuse_none(found, source)

    def of_rows(self, source: Source, *, prepare: Preparation, rows, advance: Callable[[int], None]) -> Found:
        """Features of these rows, none it may be. advance: told how many more rows are done."""
        batches, kept, dropped = [], [], collections.Counter()
        with futures.ThreadPoolExecutor() as pool:
            for taken in _side_by_side(pool, functools.partial(_read, source, self, prepare), rows, self.batch):
                good = [outcome for outcome in taken if not isinstance(outcome, Dropped)]
                dropped.update(outcome.reason for outcome in taken if isinstance(outcome, Dropped))
                if good:
                    batches.append(self(np.stack([one.x for one in good])))
                kept += [dataclasses.replace(one, x=None) for one in good]
                advance(len(taken))
        none = np.zeros((0, self.features), np.float32), np.zeros((0, self.classes), np.float32)
        features_NF, logits_NV = (np.concatenate(parts) for parts in zip(none, *batches, strict=True))
        lists = {name: [getattr(one, single) for one in kept] for name, single in LISTS.items()}
        return Found(features_NF, logits_NV, **lists, dropped=dict(dropped))


def refuse_none(found: Found, source: Source) -> Found:
    """The same set, unless it is empty.

    Raises:
      UserError: no picture of the source can be read.
    """
    if not len(found):
        reasons = counted(found.dropped) or "it is empty"
        raise UserError(f"expected pictures in {source.name}, got none that can be read ({reasons})")
    return found


def counted(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.items())


@dataclasses.dataclass(frozen=True)
class _One:
    """A picture as it was read; x: what the network reads of it."""

    key: str
    row: int
    caption: str
    hash: str
    size: tuple[int, int]
    x: np.ndarray | None


def hash_of(image: bytes | np.ndarray) -> str:
    """sha256 (hex) of a stored picture, or of the shape and pixels of one that is made."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _read(source: Source, extractor: Extractor, prepare: Preparation, row: int) -> "_One | Dropped":
    record = source[row]
    if isinstance(record, Dropped):
        return record
    try:
        image_uint8 = decode_image(record.image)
    except BadImage as bad:
        return Dropped(record.key, bad.reason, bad.detail)
    x = extractor.prepared(image_uint8, prepare)
    caption = record.captions[0] if record.captions else ""
    return _One(record.key, row, caption, hash_of(record.image), image_uint8.shape[:2], x)


def _side_by_side(pool, work: Callable, rows, size: int) -> Iterator[list]:
    """work(row) of all rows in their order, `size` at a time, the next batch under way while one is used."""
    waiting: collections.deque = collections.deque()
    for start in range(0, len(rows), size):
        waiting.append([pool.submit(work, int(row)) for row in rows[start : start + size]])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]
