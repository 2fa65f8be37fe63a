"""Features of a source's pictures by a network, in batches over all devices of this process.

Keeps every picture that decodes, in the source's order, counts those that do not, and pads the last batch instead of
dropping it. The network is Inception, or a CLIP, which also says how well pictures fit their captions.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from dalle_jax import model_dir, sharding
from dalle_jax.checkpoint import digest
from dalle_jax.convert.inception import load_published
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.in_order import in_order
from dalle_jax.data.record import Dropped, Encoded, Record, Source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.mesh import local_mesh
from dalle_jax.models import Model, Params, inception
from dalle_jax.models.clip import encode_images
from dalle_jax.sample.rerank import Reranker

BATCH = 32  # pictures a device

_features = jax.jit(Model.apply, static_argnums=0)
_vectors = jax.jit(encode_images, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture of a source that could be read.

    key: its name. index: its place in the source. caption: its first, '' for none. hash: sha256 of the picture as it is
    stored. size: height and width in pixels.
    """

    key: str
    index: int
    caption: str
    hash: str
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of the pictures of a source that could be read, in the source's order.

    features_XF: float32; logits_XV: float32, V = 0 where the network has no classes. dropped: reason -> count.
    """

    features_XF: np.ndarray
    logits_XV: np.ndarray
    rows: list[Row]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """sha256 of all pictures in their order."""
        return hashlib.sha256("".join(row.hash for row in self.rows).encode()).hexdigest()

    def without(self, indices: Collection[int]) -> "FeatureSet":
        """The same set without the pictures in these places of the source."""
        if not indices:
            return self
        kept = [i for i, row in enumerate(self.rows) if row.index not in indices]
        rows = [self.rows[i] for i in kept]
        return FeatureSet(self.features_XF[kept], self.logits_XV[kept], rows, self.dropped)

    @classmethod
    def joined(cls, parts: Sequence["FeatureSet"]) -> "FeatureSet":
        """Consecutive parts of a source as one."""
        return cls(
            np.concatenate([part.features_XF for part in parts]),
            np.concatenate([part.logits_XV for part in parts]),
            [row for part in parts for row in part.rows],
            dict(sum((collections.Counter(part.dropped) for part in parts), collections.Counter())),
        )


class Extractor:
    """Inception v3 on all devices of this process. Make one with `Extractor.load`.

    Attributes:
      network: its name in reports. digest: sha256 (hex) of its parameters. features: length of a vector. batch:
        pictures of one call.
    """

    def __init__(self, model: Model, params: Params):
        config, self.digest = model.config, digest.of_tree(params)
        self.network = f"inception-{config.pools}" + (f"-{config.features}" if config.narrow > 1 else "")
        self.features, self.classes = config.features, config.classes
        self._put(model, params)

    def _put(self, model: Model, params: Params) -> None:
        """Parameters whole on every device, each of which takes its part of a batch."""
        self.model, mesh = model, local_mesh()
        self.batch = BATCH * sharding.batch_ways(mesh)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._place = sharding.batch_sharding(mesh)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Extractor":
        """The network of a model directory, or straight from a published file (.pth, .safetensors).

        Raises:
          UserError: nothing there, or the weights of something else.
        """
        if pathlib.Path(path).is_dir():
            found = model_dir.load(path, name="inception")
            return cls(found.model, found.params)
        config, params = load_published(path)
        return cls(inception.model(config), params)

    def prepared(self, image_uint8: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        """The network's input for an image uint8 [H, W, 3]."""
        return preprocess.for_inception(image_uint8)

    def __call__(self, x_XHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [X, F] and logits [X, V] of prepared images."""
        return self._in_batches(_features, x_XHWC)

    def _in_batches(self, function: Callable, x_XHWC: np.ndarray):
        def of_batch(x_BHWC):
            return function(self.model, self._params, jax.device_put(x_BHWC, self._place))

        return sharding.in_batches(of_batch, x_XHWC, size=self.batch)

    def of_source(
        self,
        source: Source,
        *,
        preprocess: Preprocess,
        rows: Sequence[int] | np.ndarray | None = None,
        advance: Callable[[int], object] = lambda count: None,
    ) -> FeatureSet:
        """Features of these rows of a source; may be none.

        rows: default: all. advance: called with how many more rows are done.
        """
        indices = range(len(source)) if rows is None else rows
        batches, kept, dropped = [], [], collections.Counter()

        def read(index: int) -> tuple[Row, np.ndarray] | Dropped:
            record = record_at(source, index)
            if isinstance(record, Dropped):
                return record
            try:
                image_uint8 = decode_image(record.image)
            except BadImage as bad:
                return Dropped(record.key, bad.reason, bad.detail)
            caption = record.captions[0] if record.captions else ""
            height, width = image_uint8.shape[:2]
            row = Row(record.key, index, caption, hash_of(record.image), (height, width))
            return row, self.prepared(image_uint8, preprocess)

        outcomes = in_order(read, map(int, indices), threads=None, ahead=self.batch)
        while found := list(itertools.islice(outcomes, self.batch)):
            good = [outcome for outcome in found if not isinstance(outcome, Dropped)]
            dropped.update(outcome.reason for outcome in found if isinstance(outcome, Dropped))
            if good:
                batches.append(self(np.stack([x for _, x in good])))
            kept += [row for row, _ in good]
            advance(len(found))
        none = np.zeros((0, self.features), np.float32), np.zeros((0, self.classes), np.float32)
        features_XF, logits_XV = (np.concatenate(parts) for parts in zip(none, *batches, strict=True))
        return FeatureSet(features_XF, logits_XV, kept, dict(dropped))


class ClipExtractor(Extractor):
    """The image side of a CLIP in place of Inception; it has no classes, so there is no Inception score of it."""

    def __init__(self, clip: Reranker):
        self.clip, self.digest = clip, clip.digest
        self.features, self.classes = clip.model.config.embed, 0
        self.network = f"clip-{self.features}"
        self._put(clip.model, clip.params)

    def prepared(self, image_uint8: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        return preprocess.for_clip(image_uint8, self.clip.image_size)

    def __call__(self, x_XHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._in_batches(_vectors, x_XHWC), np.zeros((len(x_XHWC), 0), np.float32)


def caption_scores(
    clip: Reranker, found: FeatureSet, *, candidates: int, seed: int
) -> tuple[dict[str, float], list[str]]:
    """CLIP score and R-precision of pictures with captions, and notes on what is missing.

    found: vectors by this CLIP.

    Raises:
      UserError: vectors that are not finite.
    """
    captioned = [i for i, row in enumerate(found.rows) if row.caption]
    notes = []
    if len(captioned) < len(found):
        missing = len(found) - len(captioned)
        notes.append(f"{missing} of {len(found)} pictures have no caption: CLIP score leaves them out")
    if not captioned:
        return {}, notes
    captions = [found.rows[i].caption for i in captioned]
    different = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(different)}
    vectors_XE = clip.caption_vectors(different)[[place[caption] for caption in captions]]
    images_XE = found.features_XF[captioned]
    scores = {"clip_score": distances.clip_score(images_XE, vectors_XE), "clip_score_captions": len(captioned)}
    try:
        scores["r_precision"] = distances.r_precision(images_XE, vectors_XE, candidates=candidates, seed=seed)
        scores["r_precision_candidates"] = candidates
    except UserError as error:
        notes.append(f"no R-precision: {error}")
    return scores, notes


def counted(dropped: Mapping[str, int]) -> str:
    """'2 x no image, 1 x zero bytes'."""
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.items())


def record_at(source: Source, index: int) -> Record | Dropped:
    """source[index], of a source that was opened for its pictures."""
    record = source[index]
    assert not isinstance(record, Encoded), source.name
    return record


def hash_of(image: bytes | np.ndarray) -> str:
    """sha256 (hex) of a stored picture, or of the shape and pixels of one that is made."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
