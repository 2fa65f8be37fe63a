"""One evaluation from beginning to end: draws pictures or takes some, looks at both sets, scores and reports.

Everything that can be wrong is looked at before the long parts: weights, statistics, captions and every picture of the
reference come before the first picture is drawn. What was done is kept in OUT until the report is written, so the same
command goes on after any stop.
"""

import dataclasses
import pathlib
import shutil
import time
from typing import Any

from dalle_jax.checkpoint import digest
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import captions, clip, drawing, overlap, published, report, scores, statistics, store
from dalle_jax.evaluate.captions import Plan
from dalle_jax.evaluate.clip import ClipExtractor
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.features import Extractor, Found, counted
from dalle_jax.evaluate.protocol import Evaluation
from dalle_jax.evaluate.repeat import Expected
from dalle_jax.evaluate.sets import Features, PictureSet, open_pictures
from dalle_jax.evaluate.statistics import Statistics
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.rerank import Reranker

FEATURES = "features"  # below OUT, until the report is written


def evaluate(
    evaluation: Evaluation,
    *,
    model: str | None,
    out: pathlib.Path,
    crew: Crew,
    tell: bool,
    expected: Expected | None = None,
    save_statistics: str | None = None,
) -> dict[str, Any] | None:
    """Writes OUT/report.json and what belongs to it; the report, or None on all processes but the first.

    model: workdir of the transformer, where pictures are drawn. expected: the report that is repeated.

    Raises:
      UserError: something given is wrong or too little, or has changed since `expected`.
    """
    out, start = pathlib.Path(out), time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        job = _Job(evaluation, model, out, crew, tell, expected or Expected(), save_statistics)
        if crew.first:
            (out / report.REPORT).unlink(missing_ok=True)
        crew.meet()
        made = job.run(start)
        crew.wait([out / report.REPORT])
        crew.meet()  # nobody looks for a part any more
    except OSError as error:
        raise UserError(
            f"expected a folder to write to, got {out} ({error.strerror or error}): choose another"
        ) from error
    if crew.first:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
    return made


class _Job:
    """An evaluation whose parts are open and fit each other."""

    def __init__(self, evaluation: Evaluation, model, out, crew, tell, expected, save_statistics):
        self.evaluation, self.measure, self.out = evaluation, evaluation.measure, out
        self.crew, self.tell, self.expected, self.save_statistics = crew, tell, expected, save_statistics
        self.notes: list[str] = []
        if evaluation.departures:
            self.notes.append(f"not {evaluation.protocol} as it is: {'; '.join(evaluation.departures)}")
        if evaluation.protocol == published.CUB_PROTOCOL:
            self.notes.append(published.CUB_SCORE)
        self.features = Features(self.measure, out / FEATURES, crew, tell)
        resize = self.measure.score_resize or self.measure.resize
        self.score_features = dataclasses.replace(
            self.features, measure=dataclasses.replace(self.measure, resize=resize)
        )
        if evaluation.draw is None and (out / captions.PLAN).exists():
            raise UserError(f"{out} holds an evaluation that draws its pictures: give another --out for given ones")
        if save_statistics and len(self.measure.blur) > 1:
            raise UserError(f"expected one radius of blur to save statistics of, got {self.measure.blur}: name one")
        self.clip = Reranker.load(evaluation.clip) if evaluation.clip else None
        self.extractor = self._extractor()
        self.scorer = self._scorer()
        expected.check("weights", self.extractor.digest)
        expected.check("score_weights", None if self.scorer is None else self.scorer.digest)
        expected.check("clip", None if self.clip is None else self.clip.digest)
        self.stored = self._stored()
        self.reference = None if self.stored else self._set("reference", self._reference_source())
        self.training = self._training()
        self.given = self._set("pictures", open_pictures(evaluation.pictures)) if evaluation.pictures else None
        self.pipe, self.plan = None, None
        if evaluation.draw is not None:
            self.pipe = self._pipeline(model)
            self.plan = self._plan()

    def run(self, start: float) -> dict[str, Any] | None:
        evaluation, crew, make, radii = self.evaluation, self.crew, self.features.make, self.measure.blur
        theirs = []
        for radius in radii if self.reference else ():
            theirs.append(make(self.extractor, self.reference, radius))
            if crew.first and len(theirs) == 1:
                self._check_reference(self.features.load(theirs[0], self.reference))
        overlapping = self._overlap()
        spec = evaluation.pictures
        if self.plan is not None:
            shards = drawing.draw_all(self.pipe, self.plan, evaluation.draw, self.out, crew=crew, tell=self.tell)
            crew.wait(shards)
            spec = f"wds:{self.out / drawing.PICTURES}/*.tar"
        pictures = self.given or self._drawn(spec)
        ours = [make(self.extractor, pictures, radius) for radius in radii]
        scored = [self.score_features.make(self.scorer, pictures, radius) for radius in radii if self.scorer]
        by_clip = None if self.clip is None else make(ClipExtractor(self.clip), pictures)
        if not crew.first:
            return None
        rows, notes = [], list(self.notes)
        left_out, about_overlap = overlapping or (set(), None)
        none = [None] * len(radii)
        for radius, mine, other, classes in zip(radii, ours, theirs or none, scored or none, strict=True):
            crew.beat("score")
            found = self.features.load(mine, pictures)
            if classes is not None:
                found = dataclasses.replace(found, logits_NV=self.features.load(classes, pictures).logits_NV)
            reference = None if other is None else self.features.load(other, self.reference)
            if reference is not None and left_out:
                reference = reference.without(left_out)
            row, more = self._compare(found, reference, radius)
            rows.append({"radius": radius, **row})
            notes += [note for note in more if note not in notes]
            if radius == radii[0]:
                told = self._told(spec, pictures, found, reference)
                notes += self._doubts(found, reference)
        if by_clip is not None:
            found = self.features.load(by_clip, pictures)
            more, more_notes = clip.caption_scores(
                self.clip, found, candidates=self.measure.candidates, seed=self.measure.seed
            )
            rows[0], notes = {**rows[0], **more}, notes + more_notes
        made = {
            "protocol": evaluation.protocol,
            "scores": {name: value for name, value in rows[0].items() if name != "radius"},
            "blur": rows,
            "notes": notes,
            "network": self.extractor.network,
            "weights": self.extractor.digest,
            "resize": clip.RESIZE if self.measure.features == "clip" else self.measure.resize,
            **told,
            **({} if about_overlap is None else {"overlap": about_overlap}),
            "evaluation": evaluation.to_json(),
            "versions": report.versions(),
            "seconds": round(time.monotonic() - start, 1),
        }
        self.expected.finish(made)
        report.write(self.out, made)
        return made

    def _extractor(self) -> Extractor:
        if self.measure.features == "clip":
            if self.clip is None:
                raise UserError("expected a CLIP for features = 'clip', got none: give its folder as --config.clip=DIR")
            return ClipExtractor(self.clip)
        if not self.evaluation.weights:
            raise UserError("expected weights of Inception v3, got none: give --config.weights=PATH or --weights PATH")
        return self._inception(self.evaluation.weights, self.measure.pools)

    def _scorer(self) -> Extractor | None:
        """The network whose classes give the Inception score; None if it is the one of the features."""
        path, pools = self.evaluation.score_weights, self.measure.score_pools
        if path:
            return self._inception(path, pools)
        if self.measure.features == "inception" and pools not in ("", self.extractor.model.config.pools):
            self.notes.append(
                f"Inception score by the network {self.extractor.model.config.pools!r} instead of {pools!r}, as no "
                "config.score_weights are given"
            )
        return None

    def _inception(self, path: str, pools: str) -> Extractor:
        extractor = Extractor.load(path)
        found = extractor.model.config.pools
        if pools not in ("", found):
            raise UserError(
                f"expected the network {pools!r} for {self.evaluation.protocol or 'this'}, got {found!r} in {path}: "
                "give the weights of the other one"
            )
        return extractor

    def _stored(self) -> Statistics | None:
        path = self.evaluation.reference
        if not path.endswith(".npz"):
            return None
        if len(self.measure.blur) > 1:
            raise UserError(
                f"expected one radius of blur for the statistics in {path}, got {self.measure.blur}: statistics are of "
                "one radius, so name that"
            )
        stored = statistics.load(path)
        wanted = self._wanted(self.measure.blur[0])
        self.notes += statistics.check_comparable(wanted, self.extractor.features, stored, where=path)
        self.expected.check("reference", _digest_of(stored))
        return stored

    def _reference_source(self):
        spec = self.evaluation.reference or self.evaluation.source
        if not spec:
            raise UserError("expected a source of captions and reference pictures: give --config.source=SOURCE")
        return open_pictures(spec)

    def _set(self, name: str, source) -> PictureSet:
        measure, crop, count = self.measure, self.measure.crop, self.evaluation.count
        if name == "reference":
            crop, count = measure.reference_crop or measure.crop, self.evaluation.reference_count
        return PictureSet.of(name, source, crop=crop, count=count, seed=measure.seed)

    def _drawn(self, spec: str) -> PictureSet:
        """Every picture of the plan. Raises UserError if the shards hold more or fewer."""
        source, count = open_pictures(spec), len(self.plan.captions)
        if len(source) != count:
            raise UserError(f"expected the {count} drawn pictures in {spec}, got {len(source)}: delete this folder")
        return PictureSet.of("pictures", source, crop=self.measure.crop, count=count, seed=self.measure.seed)

    def _training(self) -> PictureSet | None:
        asked = self.evaluation.overlap
        if not asked.source:
            return None
        if self.clip is None or self.reference is None:
            raise UserError(
                "expected a CLIP and a reference of pictures to look for an overlap with: give --config.clip=DIR, and "
                "no statistics as the reference"
            )
        return PictureSet.of("training", open_pictures(asked.source), crop="none", count=0, seed=0)

    def _pipeline(self, model: str | None) -> Pipeline:
        draw = self.evaluation.draw
        if not model:
            raise UserError("expected the workdir of a transformer that draws, or --pictures SOURCE, got neither")
        if not self.evaluation.source:
            raise UserError("expected a source of captions: give --config.source=SOURCE")
        pipe = Pipeline.load(model, clip=draw.clip or None, weights=draw.weights)
        drawing.check(pipe, draw)
        self.expected.check("checkpoint", pipe.digest)
        self.expected.check("ranked_by", _ranked_by(pipe, draw))
        return pipe

    def _plan(self) -> Plan:
        evaluation = self.evaluation
        decided = {"checkpoint": self.pipe.digest, "ranked_by": _ranked_by(self.pipe, evaluation.draw)}
        settings = {**decided, "source": evaluation.source}
        draw = dataclasses.replace(evaluation.draw, clip="")  # its digest is there
        plan = captions.plan(self.out, open_source(evaluation.source), draw, settings, crew=self.crew)
        self.expected.check("captions_sha256", plan.digest)
        return plan

    def _check_reference(self, found: Found) -> None:
        exactly = self.evaluation.reference_exactly
        if exactly and len(found) != exactly:
            lost = counted(found.dropped) or "none dropped"
            raise UserError(
                f"expected {exactly} pictures in {self.reference.source.name} for {self.evaluation.protocol}, got "
                f"{len(found)} ({lost}): complete it, or take what is there by --config.reference_exactly=0"
            )
        self.expected.check("reference", found.digest)

    def _overlap(self) -> tuple[set[int], dict[str, Any]] | None:
        """The reference's rows that are left out, and what is told of the overlap."""
        if self.training is None:
            return None
        judge, whole = ClipExtractor(self.clip), dataclasses.replace(self.reference, crop="none")  # as in training
        files = self.features.make(judge, whole), self.features.make(judge, self.training)
        if not self.crew.first:
            return None
        self.crew.wait(files[1])
        reference = self.features.load(files[0], whole)
        found = overlap.nearest(reference, (store.load(file) for file in files[1]))
        if not found.seen:
            raise UserError(f"expected pictures in {self.training.source.name}, got none that can be read")
        asked = self.evaluation.overlap
        about, rows = overlap.report(reference, found, least=asked.least)
        overlap.save_sheet(self.out / overlap.SHEET, reference, found, (self.reference.source, self.training.source))
        about = {"source": asked.source, "clip": self.clip.digest, **about, "removed": asked.remove}
        return (rows if asked.remove else set()), about

    def _wanted(self, radius: float) -> dict[str, str]:
        """What statistics of the reference say of themselves."""
        crop = self.measure.reference_crop or self.measure.crop
        return {
            "network": self.extractor.network,
            "weights": self.extractor.digest,
            "resize": clip.RESIZE if self.measure.features == "clip" else self.measure.resize,
            "crop": crop,
            "side": str(self.measure.side if crop != "none" else 0),
            "blur": f"{radius:g}",
        }

    def _compare(self, found: Found, reference: Found | None, radius: float):
        theirs = self.stored or scores.statistics_of(reference, self._wanted(radius))
        if self.save_statistics:
            statistics.save(self.save_statistics, theirs)
        return scores.compare(found, theirs, reference, splits=self.measure.splits, seed=self.measure.seed)

    def _told(self, spec: str, pictures: PictureSet, found: Found, reference: Found | None) -> dict[str, Any]:
        """What was compared, with the digests by which a repetition finds what has changed."""
        evaluation = self.evaluation
        told: dict[str, Any] = {"pictures": report.described(spec, found, pictures.crop)}
        if reference is not None:
            where = evaluation.reference or evaluation.source
            told["reference"] = report.described(where, reference, self.reference.crop)
        else:
            told["reference"] = {
                "source": evaluation.reference,
                "count": self.stored.count,
                **self.stored.about,
                "sha256": _digest_of(self.stored),
            }
        if self.scorer is not None:
            resize = self.score_features.measure.resize
            told["scored_by"] = {"network": self.scorer.network, "digest": self.scorer.digest, "resize": resize}
        if self.clip is not None:
            told["clip"] = {"path": evaluation.clip, "digest": self.clip.digest}
        if self.plan is not None:
            plan = self.plan
            told["drawn"] = {
                "checkpoint": self.pipe.digest,
                "ranked_by": _ranked_by(self.pipe, evaluation.draw),
                "captions_sha256": plan.digest,
                "records": plan.records,
                "records_dropped": plan.dropped,
                "seeds": {caption_id: plan.seed(i) for i, caption_id in enumerate(plan.ids)},
            }
        return told

    def _doubts(self, found: Found, reference: Found | None) -> list[str]:
        notes = []
        crops = self.measure.crop, self.measure.reference_crop or self.measure.crop
        for name, one, crop in zip(("pictures", "reference pictures"), (found, reference), crops, strict=True):
            if one is None:
                continue
            if one.dropped:
                notes.append(f"{name} left out: {counted(one.dropped)}")
            sizes = len(set(one.sizes))
            if sizes > 1 and crop == "none":
                notes.append(f"{name} of {sizes} different sizes, each squeezed to a square")
        if self.plan is not None and self.plan.dropped:
            notes.append(f"records left out, which give no caption to draw: {counted(self.plan.dropped)}")
        if self.clip is not None and self.pipe is not None and _ranked_by(self.pipe, self.evaluation.draw):
            if self.pipe.reranker.digest == self.clip.digest:
                notes.append("the CLIP that judges has also chosen the pictures: its scores favour them")
        if self.measure.features == "clip":
            notes.append(report.NO_INCEPTION)
        return notes


def _ranked_by(pipe: Pipeline, draw) -> str | None:
    return pipe.reranker.digest if draw.best_of else None


def _digest_of(stored: Statistics) -> str:
    return digest.of_tree({"mu": stored.mean_F, "sigma": stored.covariance_FF})
