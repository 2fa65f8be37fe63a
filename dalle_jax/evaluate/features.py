"""Features of a source's pictures by Inception v3, in batches over all devices of this process.

Keeps every picture that decodes, in the source's order, counts those that do not, and pads the last batch instead of
dropping it. Knows nothing of distances.

Dimensions: B batch, H height, W width, N pictures, F features, V classes.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax import checkpoint, digest, sharding
from dalle_jax.convert import inception as importer
from dalle_jax.convert.state_dict import read_state_dict
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.record import Dropped, Source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import preprocess
from dalle_jax.models import Model, Params, build, inception

BATCH = 32  # pictures a device

_features = jax.jit(Model.apply, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pictures are brought to the network: a name of `preprocess.CROPS`, a blur radius, one of `RESIZES`."""

    resize: str = "pytorch"
    crop: str = "none"
    blur: float = 0.0

    def __call__(self, image_uint8: np.ndarray) -> np.ndarray:
        image_uint8 = preprocess.blurred(preprocess.CROPS[self.crop](image_uint8), self.blur)
        return preprocess.RESIZES[self.resize](image_uint8)


@dataclasses.dataclass(frozen=True)
class Found:
    """Features of the pictures of a source that could be read.

    features_NF, logits_NV: float32. keys: their names. dropped: reason -> count. sizes: (height, width) -> count.
    """

    features_NF: np.ndarray
    logits_NV: np.ndarray
    keys: list[str]
    dropped: dict[str, int]
    sizes: dict[tuple[int, int], int]


class Extractor:
    """A network on all devices of this process. Make one with `Extractor.load`.

    Attributes:
      network: its name in reports. digest: sha256 (hex) of its parameters.
    """

    def __init__(self, model: Model, params: Params, *, batch: int | None = None):
        mesh = sharding.make_mesh({"replica": -1}, devices=jax.local_devices())
        self.model, self.digest = model, digest.of_tree(params)
        config = model.config
        self.network = f"inception-{config.pools}" + (f"-{config.features}" if config.narrow > 1 else "")
        self.batch = (batch or BATCH) * sharding.batch_ways(mesh)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._place = NamedSharding(mesh, PartitionSpec(sharding.TABLE["batch"]))

    @classmethod
    def load(cls, path: str | os.PathLike, *, batch: int | None = None) -> "Extractor":
        """The network of a model directory, or straight from a published file (.pth, .safetensors).

        batch: pictures a device and call; default: BATCH.

        Raises:
          UserError: nothing there, or the weights of something else.
        """
        if not pathlib.Path(path).is_dir():
            config, params = importer.convert(read_state_dict(os.fspath(path)))
            return cls(inception.model(config), params, batch=batch)
        config, params = checkpoint.load_model_dir(path, name="inception")
        try:
            model = build("inception", config["model"])
        except (TypeError, ValueError) as error:
            raise UserError(f"expected a possible network in {path}, got one where {error}") from error
        checkpoint.check_params(params, model.abstract, where=os.fspath(path))
        return cls(model, params, batch=batch)

    def __call__(self, x_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `preprocess` makes of pictures -> pool3 [N, F] and logits [N, V]; N at most `batch`."""
        count = len(x_NHWC)
        if count < self.batch:  # one compiled shape
            x_NHWC = np.concatenate([x_NHWC, np.zeros((self.batch - count, *x_NHWC.shape[1:]), np.float32)])
        pool3_BF, logits_BV = _features(self.model, self._params, jax.device_put(x_NHWC, self._place))
        return np.asarray(pool3_BF)[:count], np.asarray(logits_BV)[:count]

    def of_source(self, source: Source, *, prepare: Preparation, rows=None, tell: str = "") -> Found:
        """Features of these rows of a source (default: all). tell: what the progress on stderr is named, '' for none.

        Raises:
          UserError: no picture of the source can be read.
        """
        rows = range(len(source)) if rows is None else rows
        batches, keys, sizes, dropped = [], [], collections.Counter(), collections.Counter()
        bar = tqdm.tqdm(total=len(rows), unit=" pictures", desc=tell, disable=None if tell else True, file=sys.stderr)
        with bar, futures.ThreadPoolExecutor() as pool:
            for taken in _side_by_side(pool, functools.partial(_read, source, prepare), rows, self.batch):
                good = [outcome for outcome in taken if not isinstance(outcome, Dropped)]
                dropped.update(outcome.reason for outcome in taken if isinstance(outcome, Dropped))
                keys += [key for key, _, _ in good]
                sizes.update(size for _, size, _ in good)
                if good:
                    batches.append(self(np.stack([x for _, _, x in good])))
                bar.update(len(taken))
        if not batches:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "it is empty"
            raise UserError(f"expected pictures in {source.name}, got none that can be read ({reasons})")
        features_NF, logits_NV = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return Found(features_NF, logits_NV, keys, dict(dropped), dict(sizes))


def _read(source: Source, prepare: Preparation, row: int):
    """Key, (height, width) and network input of one row, or its `Dropped`."""
    record = source[row]
    if isinstance(record, Dropped):
        return record
    try:
        image_uint8 = decode_image(record.image)
    except BadImage as bad:
        return Dropped(record.key, bad.reason, bad.detail)
    return record.key, image_uint8.shape[:2], prepare(image_uint8)


def _side_by_side(pool, work: Callable, rows, size: int) -> Iterator[list]:
    """work(row) of all rows in their order, `size` at a time, the next batch under way while one is used."""
    waiting: collections.deque = collections.deque()
    for start in range(0, len(rows), size):
        waiting.append([pool.submit(work, int(row)) for row in rows[start : start + size]])
        if len(waiting) > 1:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]
