"""Everything that an evaluation reads, opened and checked against each other before the long parts begin."""

import dataclasses
from typing import Any

from dalle_jax.checkpoint.digest import of_tree
from dalle_jax.config import flatten
from dalle_jax.errors import UserError
from dalle_jax.evaluate import report, statistics
from dalle_jax.evaluate.drawing import Drawing
from dalle_jax.evaluate.feature_cache import ImageSet, open_images
from dalle_jax.evaluate.features import ClipExtractor, Extractor
from dalle_jax.evaluate.preprocess import CLIP_RESIZE, Preprocess
from dalle_jax.evaluate.protocol import COMPUTED, DIGESTS, Evaluation
from dalle_jax.evaluate.statistics import Statistics
from dalle_jax.sample.rerank import Reranker


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that `open_inputs` opened.

    extractor: the network of the features. scorer: the one of the Inception score, None for the same. clip: None
    without one. reference: its statistics or its pictures. training: pictures to look for in the reference, if any.
    images: those that are judged, or what draws them. notes: what a reader of the scores has to know.
    """

    evaluation: Evaluation
    extractor: Extractor
    scorer: Extractor | None
    clip: ClipExtractor | None
    reference: Statistics | ImageSet
    training: ImageSet | None
    images: ImageSet | Drawing
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The sections of a report on what was opened; by their digests a repetition finds what has changed."""
        evaluation, network = self.evaluation, self.extractor
        resize = made_of(evaluation, network, 0.0)["resize"]
        summary: dict[str, Any] = {"network": network.network, "weights": network.digest, "resize": resize}
        if isinstance(self.reference, Statistics):
            about = {"source": evaluation.reference, "count": self.reference.count, **self.reference.about}
            sha256 = of_tree({"mu": self.reference.mean_F, "sigma": self.reference.covariance_FF})
            summary["reference"] = {**about, "sha256": sha256}
        if self.scorer is not None:
            resize = evaluation.measure.score_resize or evaluation.measure.resize
            summary["scored_by"] = {"network": self.scorer.network, "digest": self.scorer.digest, "resize": resize}
        if self.clip is not None:
            summary["clip"] = {"path": evaluation.clip, "digest": self.clip.digest}
        if isinstance(self.images, Drawing):
            summary["drawn"] = {"checkpoint": self.images.pipe.digest, "ranked_by": self.images.ranked_by}
        return summary

    def preprocess(self, images: ImageSet, radius: float = 0.0, *, resize: str | None = None) -> Preprocess:
        """The way a set is brought to a network. resize: default: that of the features."""
        measure = self.evaluation.measure
        return Preprocess(resize=resize or measure.resize, crop=images.crop, side=measure.side, blur=radius)


def open_inputs(evaluation: Evaluation, *, model: str | None, tensor: int = 1) -> Inputs:
    """Opens what an evaluation reads. model: workdir of the transformer that draws, on `tensor` devices a copy.

    Raises:
      UserError: something is missing, cannot be read, does not fit the rest, or is not what `evaluation.expected` says.
    """
    notes = []
    if evaluation.departures:
        notes.append(f"not {evaluation.protocol} as it is: {'; '.join(evaluation.departures)}")
    if evaluation.protocol == report.CUB_PROTOCOL:
        notes.append(report.CUB_SCORE)
    clip = ClipExtractor(Reranker.load(evaluation.clip)) if evaluation.clip else None
    extractor = _extractor(evaluation, clip)
    scorer = _scorer(evaluation, extractor, notes)
    reference = _reference(evaluation, extractor, notes)
    training = None
    if evaluation.overlap.source:
        if clip is None or isinstance(reference, Statistics):
            raise UserError(
                "expected a CLIP and a reference of pictures to look for an overlap with: give --config.clip=DIR, and "
                "no statistics as the reference"
            )
        training = ImageSet.choose("training", open_images(evaluation.overlap.source), crop="none")
    images = _images(evaluation, model, tensor)
    inputs = Inputs(evaluation, extractor, scorer, clip, reference, training, images, tuple(notes))
    if evaluation.expected is not None:
        found = flatten(inputs.summary())
        for name in DIGESTS:
            if name in found or name not in COMPUTED:
                evaluation.expected.check(name, found.get(name))
    return inputs


def _extractor(evaluation: Evaluation, clip: ClipExtractor | None) -> Extractor:
    if evaluation.measure.features == "clip":
        if clip is None:
            raise UserError("expected a CLIP for features = 'clip', got none: give its folder as --config.clip=DIR")
        return clip
    if not evaluation.weights:
        raise UserError("expected weights of Inception v3, got none: give --weights PATH")
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


def _reference(evaluation: Evaluation, extractor: Extractor, notes: list[str]) -> Statistics | ImageSet:
    spec, measure = evaluation.reference or evaluation.source, evaluation.measure
    if not spec:
        raise UserError(
            "expected a source of captions and reference pictures: give --config.source=SOURCE, or --reference SOURCE"
        )
    if not spec.endswith(".npz"):
        count, crop = evaluation.reference_count, measure.crops[1]
        return ImageSet.choose("reference", open_images(spec), crop=crop, count=count, seed=measure.seed)
    if len(measure.blur) > 1:
        raise UserError(
            f"expected one radius of blur for the statistics in {spec}, got {measure.blur}: statistics are of one "
            "radius, so name that"
        )
    stored = statistics.load(spec)
    wanted = made_of(evaluation, extractor, measure.blur[0])
    notes += statistics.check_comparable(wanted, extractor.features, stored, where=spec)
    return stored


def made_of(evaluation: Evaluation, extractor: Extractor, radius: float) -> dict[str, str]:
    """The network and preprocessing of the reference, in the words of a statistics file."""
    measure = evaluation.measure
    resize = CLIP_RESIZE if measure.features == "clip" else measure.resize
    preprocess = Preprocess(resize=resize, crop=measure.crops[1], side=measure.side, blur=radius)
    return {"network": extractor.network, "weights": extractor.digest, **preprocess.to_words()}


def _images(evaluation: Evaluation, model: str | None, tensor: int) -> ImageSet | Drawing:
    measure = evaluation.measure
    if evaluation.pictures is not None:
        source, crop = open_images(evaluation.pictures), measure.crop
        return ImageSet.choose("pictures", source, crop=crop, count=evaluation.count, seed=measure.seed)
    if not model or evaluation.draw is None:
        raise UserError("expected the workdir of a transformer that draws, or --pictures SOURCE, got neither")
    if not evaluation.source:
        raise UserError("expected a source of captions: give --config.source=SOURCE")
    return Drawing.load(model, evaluation.draw, evaluation.source, tensor=tensor)
