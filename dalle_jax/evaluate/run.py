"""One evaluation from beginning to end: draws pictures or takes some, looks at both sets, scores and reports.

Everything that can be wrong is looked at before the long parts: weights, statistics, captions and every picture of the
reference come before the first picture is drawn. What was done is kept in OUT until the report is written, so the same
command goes on after any stop.
"""

import dataclasses
import glob
import pathlib
import shutil
import time
from collections.abc import Collection
from typing import Any

from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, drawing, feature_cache, overlap, report, statistics
from dalle_jax.evaluate.clip import ClipExtractor, caption_scores
from dalle_jax.evaluate.drawing import Plan
from dalle_jax.evaluate.feature_cache import FeatureCache, PictureSet, open_pictures
from dalle_jax.evaluate.features import FeatureSet, counted
from dalle_jax.evaluate.inputs import Inputs, digest_of, open_inputs
from dalle_jax.evaluate.protocol import Evaluation
from dalle_jax.evaluate.statistics import Statistics
from dalle_jax.evaluate.workers import Worker

FEATURES = "features"  # below OUT, until the report is written


def evaluate(
    evaluation: Evaluation,
    *,
    model: str | None,
    out: pathlib.Path,
    worker: Worker,
    save_statistics: str | None = None,
) -> dict[str, Any] | None:
    """Writes OUT/report.json and what belongs to it; the report, or None on all workers but the first.

    model: workdir of the transformer, where pictures are drawn. save_statistics: where to write those of the reference.

    Raises:
      UserError: something given is wrong or too little, or is not what `evaluation.expected` says.
    """
    out, start = pathlib.Path(out), time.monotonic()
    if save_statistics and len(evaluation.measure.blur) > 1:
        raise UserError(f"expected one radius of blur to save statistics of, got {evaluation.measure.blur}: name one")
    if evaluation.draw is None and (out / drawing.PLAN).exists():
        raise UserError(f"{out} holds an evaluation that draws its pictures: give another --out for given ones")
    try:
        out.mkdir(parents=True, exist_ok=True)
        inputs = open_inputs(evaluation, model=model)
        plan = None if inputs.pipe is None else _plan(inputs, out, worker)
        if worker.first:
            (out / report.REPORT).unlink(missing_ok=True)
        worker.meet()
        made = run(inputs, plan, out=out, worker=worker, save_statistics=save_statistics)
        if made is not None:
            made["seconds"] = round(time.monotonic() - start, 1)
            report.write(out, made)
        worker.wait([out / report.REPORT])
        worker.meet()  # nobody looks for a part any more
    except OSError as error:
        raise UserError(
            f"expected a folder to write to, got {out} ({error.strerror or error}): choose another"
        ) from error
    if worker.first:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
    return made


def _plan(inputs: Inputs, out: pathlib.Path, worker: Worker) -> Plan:
    """The captions that are drawn."""
    evaluation = inputs.evaluation
    settings = {"checkpoint": inputs.pipe.digest, "ranked_by": inputs.ranked_by, "source": evaluation.source}
    draw = dataclasses.replace(evaluation.draw, clip=None)  # `ranked_by` says which
    plan = drawing.plan(out, open_source(evaluation.source), draw, settings, worker=worker)
    if evaluation.expected is not None:
        evaluation.expected.check("drawn.captions_sha256", plan.digest)
    return plan


def run(
    inputs: Inputs, plan: Plan | None, *, out: pathlib.Path, worker: Worker, save_statistics: str | None = None
) -> dict[str, Any] | None:
    """The report of an evaluation, or None on all workers but the first."""
    measure, cache = inputs.evaluation.measure, FeatureCache(out / FEATURES, worker)
    reference_parts = _reference_parts(inputs, cache)
    near_duplicates, overlap_summary = _overlap(inputs, cache, out)
    pictures = inputs.pictures
    if plan is not None:
        worker.wait(drawing.draw_all(inputs.pipe, plan, inputs.evaluation.draw, out, worker=worker))
        pictures = _drawn_pictures(inputs, plan, out)
    parts = _picture_parts(inputs, pictures, cache)
    clip_parts = None
    if inputs.clip is not None:
        clip_parts = cache.make(ClipExtractor(inputs.clip), pictures, inputs.preprocess(pictures))
    if not worker.first:
        return None
    rows, notes, summary = [], list(inputs.notes), {}
    for number, radius in enumerate(measure.blur):
        worker.beat("score")
        found = _load(parts[number], pictures, cache)
        reference = None
        if inputs.reference is not None:
            reference = cache.load(reference_parts[number], inputs.reference).without(near_duplicates)
        stored = inputs.stored or _statistics_of(inputs, reference, radius)
        if save_statistics:
            statistics.save(save_statistics, stored)
        scores, warnings = distances.compare(
            found.features_XF,
            found.logits_XV,
            stored,
            None if reference is None else reference.features_XF,
            splits=measure.splits,
            seed=measure.seed,
        )
        rows.append({"radius": radius, **scores})
        notes += [note for note in warnings if note not in notes]
        if number == 0:
            summary = _summary(inputs, plan, pictures, found, reference)
            notes += _warnings(inputs, plan, found, reference)
    if clip_parts is not None:
        found = cache.load(clip_parts, pictures)
        scores, warnings = caption_scores(inputs.clip, found, candidates=measure.candidates, seed=measure.seed)
        rows[0] |= scores
        notes += warnings
    made = {
        "protocol": inputs.evaluation.protocol,
        "scores": {name: value for name, value in rows[0].items() if name != "radius"},
        "blur": rows,
        "notes": notes,
        "network": inputs.extractor.network,
        "weights": inputs.extractor.digest,
        "resize": inputs.made_of(0.0)["resize"],
        **summary,
        **({} if overlap_summary is None else {"overlap": overlap_summary}),
        "evaluation": inputs.evaluation.to_json(),
        "versions": report.versions(),
    }
    expected = inputs.evaluation.expected
    return made if expected is None else report.compared(made, expected)


def _reference_parts(inputs: Inputs, cache: FeatureCache) -> list[list[pathlib.Path]]:
    """Files with the reference's features by radius of blur; every picture of it is read at the first."""
    if inputs.reference is None:
        return []
    made = []
    for radius in inputs.evaluation.measure.blur:
        made.append(cache.make(inputs.extractor, inputs.reference, inputs.preprocess(inputs.reference, radius)))
        if cache.worker.first and len(made) == 1:
            _check_reference(inputs.evaluation, cache.load(made[0], inputs.reference), inputs.reference.source.name)
    return made


def _check_reference(evaluation: Evaluation, found: FeatureSet, name: str) -> None:
    exactly = evaluation.reference_exactly
    if exactly is not None and len(found) != exactly:
        lost = counted(found.dropped) or "none dropped"
        raise UserError(
            f"expected {exactly} pictures in {name} for {evaluation.protocol}, got {len(found)} ({lost}): complete it, "
            f"or take what is there by --config.reference_exactly={len(found)}"
        )
    if evaluation.expected is not None:
        evaluation.expected.check("reference.sha256", found.digest)


def _picture_parts(inputs: Inputs, pictures: PictureSet, cache: FeatureCache) -> list[tuple[list, list | None]]:
    """Files with the pictures' features by radius of blur, and with their classes by the other network, if any."""
    measure = inputs.evaluation.measure
    parts = [cache.make(inputs.extractor, pictures, inputs.preprocess(pictures, radius)) for radius in measure.blur]
    if inputs.scorer is None:
        return [(files, None) for files in parts]
    scored = [
        cache.make(inputs.scorer, pictures, inputs.preprocess(pictures, radius, resize=measure.score_resize))
        for radius in measure.blur
    ]
    return list(zip(parts, scored, strict=True))


def _drawn_pictures(inputs: Inputs, plan: Plan, out: pathlib.Path) -> PictureSet:
    """Every picture of the plan.

    Raises:
      UserError: the shards hold more or fewer.
    """
    source = open_pictures(f"wds:{glob.escape(str(out / drawing.PICTURES))}/*.tar")
    count, measure = len(plan.captions), inputs.evaluation.measure
    if len(source) != count:
        raise UserError(f"expected the {count} drawn pictures in {source.name}, got {len(source)}: delete this folder")
    return PictureSet.choose("pictures", source, crop=measure.crop, count=count, seed=measure.seed)


def _load(parts: tuple[list, list | None], pictures: PictureSet, cache: FeatureCache) -> FeatureSet:
    found = cache.load(parts[0], pictures)
    if parts[1] is None:
        return found
    return dataclasses.replace(found, logits_XV=cache.load(parts[1], pictures).logits_XV)


def _overlap(inputs: Inputs, cache: FeatureCache, out: pathlib.Path) -> tuple[Collection[int], dict[str, Any] | None]:
    """Rows to exclude from the reference, and the overlap section of the report."""
    if inputs.training is None:
        return (), None
    judge, whole = ClipExtractor(inputs.clip), dataclasses.replace(inputs.reference, crop="none")  # as in training
    reference_parts = cache.make(judge, whole, inputs.preprocess(whole))
    training_parts = cache.make(judge, inputs.training, inputs.preprocess(inputs.training))
    if not cache.worker.first:
        return (), None
    cache.worker.wait(training_parts)
    reference = cache.load(reference_parts, whole)
    nearest = overlap.nearest(reference, map(feature_cache.load, training_parts))
    if not nearest.seen:
        raise UserError(f"expected pictures in {inputs.training.source.name}, got none that can be read")
    asked = inputs.evaluation.overlap
    summary, duplicates = overlap.summary(reference, nearest, least=asked.least)
    sources = inputs.reference.source, inputs.training.source
    overlap.save_sheet(out / overlap.SHEET, reference, nearest, sources)
    summary = {"source": asked.source, "clip": inputs.clip.digest, **summary, "removed": asked.remove}
    return (duplicates if asked.remove else ()), summary


def _statistics_of(inputs: Inputs, reference: FeatureSet, radius: float) -> Statistics:
    mean_F, covariance_FF = distances.mean_and_covariance(reference.features_XF)
    return Statistics(mean_F, covariance_FF, len(reference), inputs.made_of(radius))


def _summary(
    inputs: Inputs, plan: Plan | None, pictures: PictureSet, found: FeatureSet, reference: FeatureSet | None
) -> dict[str, Any]:
    """What was compared, with the digests by which a repetition finds what has changed."""
    evaluation, stored = inputs.evaluation, inputs.stored
    spec = evaluation.pictures or pictures.source.name
    summary: dict[str, Any] = {"pictures": report.described(spec, found, pictures.crop)}
    if reference is not None:
        where = evaluation.reference or evaluation.source
        summary["reference"] = report.described(where, reference, inputs.reference.crop)
    else:
        about = {"source": evaluation.reference, "count": stored.count, **stored.about}
        summary["reference"] = {**about, "sha256": digest_of(stored)}
    if inputs.scorer is not None:
        resize = evaluation.measure.score_resize or evaluation.measure.resize
        summary["scored_by"] = {"network": inputs.scorer.network, "digest": inputs.scorer.digest, "resize": resize}
    if inputs.clip is not None:
        summary["clip"] = {"path": evaluation.clip, "digest": inputs.clip.digest}
    if plan is not None:
        summary["drawn"] = {
            "checkpoint": inputs.pipe.digest,
            "ranked_by": inputs.ranked_by,
            "captions_sha256": plan.digest,
            "records": plan.records,
            "records_dropped": plan.dropped,
            "seeds": {caption_id: plan.seed(i) for i, caption_id in enumerate(plan.ids)},
        }
    return summary


def _warnings(inputs: Inputs, plan: Plan | None, found: FeatureSet, reference: FeatureSet | None) -> list[str]:
    """What is possible but doubtful."""
    warnings = []
    sets = zip(("pictures", "reference pictures"), (found, reference), inputs.evaluation.measure.crops, strict=True)
    for name, one, crop in sets:
        if one is None:
            continue
        if one.dropped:
            warnings.append(f"{name} left out: {counted(one.dropped)}")
        sizes = len({row.size for row in one.rows})
        if sizes > 1 and crop == "none":
            warnings.append(f"{name} of {sizes} different sizes, each squeezed to a square")
    if plan is not None and plan.dropped:
        warnings.append(f"records left out, which give no caption to draw: {counted(plan.dropped)}")
    if inputs.clip is not None and inputs.ranked_by == inputs.clip.digest:
        warnings.append("the CLIP that judges has also chosen the pictures: its scores favor them")
    if inputs.evaluation.measure.features == "clip":
        warnings.append(report.NO_INCEPTION)
    return warnings
