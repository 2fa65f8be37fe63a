"""Everything that an evaluation reads, opened and checked against each other before the long parts begin."""

import dataclasses
from typing import Any

from dalle_jax.checkpoint import digest
from dalle_jax.errors import UserError
from dalle_jax.evaluate import drawing, report, statistics
from dalle_jax.evaluate.clip import ClipExtractor
from dalle_jax.evaluate.feature_cache import PictureSet, open_pictures
from dalle_jax.evaluate.features import Extractor
from dalle_jax.evaluate.preprocess import CLIP_RESIZE, Preprocess
from dalle_jax.evaluate.protocol import Evaluation
from dalle_jax.evaluate.statistics import Statistics
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.rerank import Reranker


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What `open_inputs` opened.

    extractor: the network of the features. scorer: the one of the Inception score, None for the same. clip: None
    without one. stored: statistics of the reference, or reference: its pictures; one of them. training: pictures to
    look for in the reference, or None. pictures: those that are judged, or pipe: what draws them. notes: what a reader
    of the scores has to know.
    """

    evaluation: Evaluation
    extractor: Extractor
    scorer: Extractor | None
    clip: Reranker | None
    stored: Statistics | None
    reference: PictureSet | None
    training: PictureSet | None
    pictures: PictureSet | None
    pipe: Pipeline | None
    notes: tuple[str, ...]

    @property
    def ranked_by(self) -> str | None:
        """sha256 of the CLIP that chooses among candidates."""
        return None if self.pipe is None else _ranked_by(self.pipe, self.evaluation)

    @property
    def digests(self) -> dict[str, str | None]:
        """sha256 of what was opened, by the names of `protocol.DIGESTS`."""
        found = {
            "weights": self.extractor.digest,
            "scored_by.digest": None if self.scorer is None else self.scorer.digest,
            "clip.digest": None if self.clip is None else self.clip.digest,
            "drawn.checkpoint": None if self.pipe is None else self.pipe.digest,
            "drawn.ranked_by": self.ranked_by,
        }
        return found if self.stored is None else {**found, "reference.sha256": digest_of(self.stored)}

    def preprocess(self, pictures: PictureSet, radius: float = 0.0, *, resize: str | None = None) -> Preprocess:
        """How a set is brought to a network. resize: default: that of the features."""
        measure = self.evaluation.measure
        return Preprocess(resize=resize or measure.resize, crop=pictures.crop, side=measure.side, blur=radius)

    def made_of(self, radius: float) -> dict[str, str]:
        """What statistics of the reference say of themselves."""
        return _made_of(self.evaluation, self.extractor, radius)


def open_inputs(evaluation: Evaluation, *, model: str | None) -> Inputs:
    """Opens what an evaluation reads. model: workdir of the transformer that draws.

    Raises:
      UserError: something is missing, cannot be read, does not fit the rest, or is not what `evaluation.expected` says.
    """
    notes = []
    if evaluation.departures:
        notes.append(f"not {evaluation.protocol} as it is: {'; '.join(evaluation.departures)}")
    if evaluation.protocol == report.CUB_PROTOCOL:
        notes.append(report.CUB_SCORE)
    clip = Reranker.load(evaluation.clip) if evaluation.clip else None
    extractor = _extractor(evaluation, clip)
    scorer = _scorer(evaluation, extractor, notes)
    stored = _stored(evaluation, extractor, notes)
    reference = None if stored else _reference(evaluation)
    training = _training(evaluation, clip, reference)
    pictures = pipe = None
    if evaluation.draw is None:
        pictures = _choose("pictures", open_pictures(evaluation.pictures), evaluation)
    else:
        pipe = _pipeline(evaluation, model)
    inputs = Inputs(evaluation, extractor, scorer, clip, stored, reference, training, pictures, pipe, tuple(notes))
    for name, found in inputs.digests.items():
        if evaluation.expected is not None:
            evaluation.expected.check(name, found)
    return inputs


def _extractor(evaluation: Evaluation, clip: Reranker | None) -> Extractor:
    if evaluation.measure.features == "clip":
        if clip is None:
            raise UserError("expected a CLIP for features = 'clip', got none: give its folder as --config.clip=DIR")
        return ClipExtractor(clip)
    if not evaluation.weights:
        raise UserError("expected weights of Inception v3, got none: give --config.weights=PATH or --weights PATH")
    return _inception(evaluation, evaluation.weights, evaluation.measure.pools)


def _scorer(evaluation: Evaluation, extractor: Extractor, notes: list[str]) -> Extractor | None:
    """The network whose classes give the Inception score; None if it is the one of the features."""
    pools = evaluation.measure.score_pools
    if evaluation.score_weights:
        return _inception(evaluation, evaluation.score_weights, pools)
    if evaluation.measure.features == "inception" and pools not in (None, extractor.model.config.pools):
        notes.append(
            f"Inception score by the network {extractor.model.config.pools!r} instead of {pools!r}, as no "
            "config.score_weights are given"
        )
    return None


def _inception(evaluation: Evaluation, path: str, pools: str | None) -> Extractor:
    extractor = Extractor.load(path)
    found = extractor.model.config.pools
    if pools not in (None, found):
        raise UserError(
            f"expected the network {pools!r} for {evaluation.protocol or 'this'}, got {found!r} in {path}: "
            "give the weights of the other one"
        )
    return extractor


def _stored(evaluation: Evaluation, extractor: Extractor, notes: list[str]) -> Statistics | None:
    """Statistics of the reference, where a file of them is given instead of pictures."""
    path, blur = evaluation.reference, evaluation.measure.blur
    if not path or not path.endswith(".npz"):
        return None
    if len(blur) > 1:
        raise UserError(
            f"expected one radius of blur for the statistics in {path}, got {blur}: statistics are of one radius, so "
            "name that"
        )
    stored = statistics.load(path)
    wanted = _made_of(evaluation, extractor, blur[0])
    notes += statistics.check_comparable(wanted, extractor.features, stored, where=path)
    return stored


def digest_of(stored: Statistics) -> str:
    """sha256 of the mean and the covariance."""
    return digest.of_tree({"mu": stored.mean_F, "sigma": stored.covariance_FF})


def _made_of(evaluation: Evaluation, extractor: Extractor, radius: float) -> dict[str, str]:
    measure = evaluation.measure
    resize = CLIP_RESIZE if measure.features == "clip" else measure.resize
    preprocess = Preprocess(resize=resize, crop=measure.crops[1], side=measure.side, blur=radius)
    return {"network": extractor.network, "weights": extractor.digest, **preprocess.to_words()}


def _reference(evaluation: Evaluation) -> PictureSet:
    spec = evaluation.reference or evaluation.source
    if not spec:
        raise UserError("expected a source of captions and reference pictures: give --config.source=SOURCE")
    return _choose("reference", open_pictures(spec), evaluation)


def _choose(name: str, source: Any, evaluation: Evaluation) -> PictureSet:
    crop, reference_crop = evaluation.measure.crops
    count = evaluation.count
    if name == "reference":
        crop, count = reference_crop, evaluation.reference_count
    return PictureSet.choose(name, source, crop=crop, count=count, seed=evaluation.measure.seed)


def _training(evaluation: Evaluation, clip: Reranker | None, reference: PictureSet | None) -> PictureSet | None:
    if not evaluation.overlap.source:
        return None
    if clip is None or reference is None:
        raise UserError(
            "expected a CLIP and a reference of pictures to look for an overlap with: give --config.clip=DIR, and "
            "no statistics as the reference"
        )
    return PictureSet.choose("training", open_pictures(evaluation.overlap.source), crop="none")


def _pipeline(evaluation: Evaluation, model: str | None) -> Pipeline:
    draw = evaluation.draw
    if not model:
        raise UserError("expected the workdir of a transformer that draws, or --pictures SOURCE, got neither")
    if not evaluation.source:
        raise UserError("expected a source of captions: give --config.source=SOURCE")
    pipe = Pipeline.load(model, clip=draw.clip, weights=draw.weights)
    drawing.check(pipe, draw)
    return pipe


def _ranked_by(pipe: Pipeline, evaluation: Evaluation) -> str | None:
    return pipe.reranker.digest if evaluation.draw.best_of else None
