"""One evaluation from beginning to end: draws pictures or takes some, looks at both sets, scores and reports.

Everything that can be wrong is looked at before the long parts: weights, statistics, captions and every picture of the
reference come before the first picture is drawn. What was done is kept in OUT until the report is written, so the same
command goes on after any stop.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Collection
from typing import Any

from dalle_jax import files, signals
from dalle_jax.data.sources.tar import ShardSource
from dalle_jax.errors import UserError, writing_to
from dalle_jax.evaluate import distances, drawing, overlap, report, statistics
from dalle_jax.evaluate.drawing import Drawing, Plan
from dalle_jax.evaluate.feature_cache import FeatureCache, ImageSet, Parts
from dalle_jax.evaluate.features import FeatureSet, caption_scores, counted
from dalle_jax.evaluate.inputs import Inputs, made_of, open_inputs
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
    tensor: int = 1,
    save_statistics: str | None = None,
) -> dict[str, Any] | None:
    """Writes OUT/report.json and what belongs to it; the report, or None on all workers but the first.

    model: workdir of the transformer, where pictures are drawn. tensor: devices that share one copy of it.
    save_statistics: where to write those of the reference.

    Raises:
      UserError: something given is wrong or too little, or is not what `evaluation.expected` says.
    """
    start = time.monotonic()
    if save_statistics and len(evaluation.measure.blur) > 1:
        raise UserError(f"expected one radius of blur to save statistics of, got {evaluation.measure.blur}: name one")
    if evaluation.draw is None and (out / drawing.PLAN).exists():
        raise UserError(f"{out} holds an evaluation that draws its pictures: give another --out for given ones")
    if save_statistics:
        statistics.check_place(save_statistics)
    with writing_to(out):
        files.prepare(out)
    inputs = open_inputs(evaluation, model=model, tensor=tensor)  # whose failures are not those of OUT
    kept = f"what is drawn and computed so far is kept in {out}: the same command goes on with it"
    with writing_to(out), signals.keeping(kept):
        plan = inputs.images.plan(out, worker) if isinstance(inputs.images, Drawing) else None
        if plan is not None and evaluation.expected is not None:
            evaluation.expected.check("drawn.captions_sha256", plan.digest)
        if worker.first:
            (out / report.REPORT).unlink(missing_ok=True)
        worker.meet()
        made = run(inputs, plan, out=out, worker=worker, save_statistics=save_statistics)
        if made is not None:
            made["seconds"] = round(time.monotonic() - start, 1)
            report.write(out, made)
        worker.wait([out / report.REPORT])
        worker.meet()  # nobody looks for a part any more
    if worker.first:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
    return made


def run(
    inputs: Inputs, plan: Plan | None, *, out: pathlib.Path, worker: Worker, save_statistics: str | None = None
) -> dict[str, Any] | None:
    """The report of an evaluation, or None on all workers but the first. plan: the captions that are drawn."""
    measure, cache = inputs.evaluation.measure, FeatureCache(out / FEATURES, worker)
    reference_parts = _reference_parts(inputs, cache)
    excluded, overlap_summary = _overlap(inputs, cache, out)
    images = _images(inputs, plan, out, worker)
    parts = [cache.make(inputs.extractor, images, inputs.preprocess(images, radius)) for radius in measure.blur]
    class_parts = []
    if inputs.scorer is not None:
        prepared = [inputs.preprocess(images, radius, resize=measure.score_resize) for radius in measure.blur]
        class_parts = [cache.make(inputs.scorer, images, preprocess) for preprocess in prepared]
    clip_parts = None if inputs.clip is None else cache.make(inputs.clip, images, inputs.preprocess(images))
    if not worker.first:
        return None
    rows, notes, summary = [], list(inputs.notes), {}
    for number, radius in enumerate(measure.blur):
        worker.beat("score")
        found = parts[number].load()
        logits_XV = class_parts[number].load().logits_XV if class_parts else found.logits_XV
        if isinstance(inputs.reference, Statistics):
            stored, reference = inputs.reference, None
        else:
            reference = reference_parts[number].load().without(excluded)
            mean_F, covariance_FF = distances.mean_and_covariance(reference.features_XF)
            about = made_of(inputs.evaluation, inputs.extractor, radius)
            stored = Statistics(mean_F, covariance_FF, len(reference), about)
        if save_statistics:
            statistics.save(save_statistics, stored)
        reference_YF = None if reference is None else reference.features_XF
        scores, warnings = distances.compare(
            found.features_XF, logits_XV, stored, reference_YF, splits=measure.splits, seed=measure.seed
        )
        rows.append({"radius": radius, **scores})
        notes += [note for note in warnings if note not in notes]
        if number == 0:
            summary = inputs.summary() | _sets(inputs, images, found, reference)
            if plan is not None:
                summary["drawn"] |= plan.summary()
            notes += _warnings(inputs, plan, found, reference)
    if inputs.clip is not None and clip_parts is not None:
        scores, warnings = caption_scores(
            inputs.clip.clip, clip_parts.load(), candidates=measure.candidates, seed=measure.seed
        )
        rows[0] |= scores
        notes += warnings
    made = {
        "protocol": inputs.evaluation.protocol,
        "scores": {name: value for name, value in rows[0].items() if name != "radius"},
        "blur": rows,
        "notes": notes,
        **summary,
        **overlap_summary,
        "evaluation": inputs.evaluation.to_json(),
        "versions": report.versions(),
    }
    expected = inputs.evaluation.expected
    return made if expected is None else report.compared(made, expected)


def _reference_parts(inputs: Inputs, cache: FeatureCache) -> list[Parts]:
    """The reference's features by radius of blur, none of stored statistics; every picture is read at the first."""
    evaluation, reference, made = inputs.evaluation, inputs.reference, []
    if isinstance(reference, Statistics):
        return []
    for radius in evaluation.measure.blur:
        made.append(cache.make(inputs.extractor, reference, inputs.preprocess(reference, radius)))
        if len(made) > 1 or not cache.worker.first:
            continue
        found, exactly = made[0].load(), evaluation.reference_exactly
        if exactly is not None and len(found) != exactly:
            lost = counted(found.dropped) or "none dropped"
            raise UserError(
                f"expected {exactly} pictures in {reference.source.name} for {evaluation.protocol}, got {len(found)} "
                f"({lost}): complete it, or take what is there by --config.reference_exactly={len(found)}"
            )
        if evaluation.expected is not None:
            evaluation.expected.check("reference.sha256", found.digest)
    return made


def _overlap(inputs: Inputs, cache: FeatureCache, out: pathlib.Path) -> tuple[Collection[int], dict[str, Any]]:
    """Rows to exclude from the reference, and the overlap section of the report."""
    clip, training, reference, asked = inputs.clip, inputs.training, inputs.reference, inputs.evaluation.overlap
    if clip is None or training is None or isinstance(reference, Statistics):
        return (), {}
    whole = dataclasses.replace(reference, crop="none")  # as in training
    found = cache.make(clip, whole, inputs.preprocess(whole)).load()
    paths = overlap.search(clip, found, training, folder=cache.folder, worker=cache.worker)
    if not cache.worker.first:
        return (), {}
    cache.worker.wait(paths)
    pairs, seen = overlap.closest(paths, found, training.source)
    summary, duplicates = overlap.summary(pairs, training.source, seen=seen, min_cosine=asked.min_cosine)
    overlap.save_sheet(out / overlap.SHEET, pairs, (reference.source, training.source))
    summary = {"source": asked.source, "clip": clip.digest, **summary, "removed": asked.remove}
    return (duplicates if asked.remove else ()), {"overlap": summary}


def _images(inputs: Inputs, plan: Plan | None, out: pathlib.Path, worker: Worker) -> ImageSet:
    """The pictures that are judged, drawn first if need be.

    Raises:
      UserError: the shards of drawn pictures hold more or fewer than the plan.
    """
    if isinstance(inputs.images, ImageSet):
        return inputs.images
    assert plan is not None
    worker.wait(inputs.images.draw_all(plan, out, worker))
    folder = out / drawing.PICTURES
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]  # not as a pattern, whose letters OUT may have
    source = ShardSource(f"wds:{folder}", shards, captions_required=False)
    count, measure = len(plan.captions), inputs.evaluation.measure
    if len(source) != count:
        raise UserError(f"expected the {count} drawn pictures in {source.name}, got {len(source)}: use another --out")
    return ImageSet.choose("pictures", source, crop=measure.crop, count=count, seed=measure.seed)


def _sets(inputs: Inputs, images: ImageSet, found: FeatureSet, reference: FeatureSet | None) -> dict[str, Any]:
    """The sections of the report on the pictures that were compared."""
    evaluation, crops = inputs.evaluation, inputs.evaluation.measure.crops
    sets = {"pictures": report.described(evaluation.pictures or images.source.name, found, crops[0])}
    if reference is not None:
        where = evaluation.reference or evaluation.source or ""
        sets["reference"] = report.described(where, reference, crops[1])
    return sets


def _warnings(inputs: Inputs, plan: Plan | None, found: FeatureSet, reference: FeatureSet | None) -> list[str]:
    """Notes on what is possible but doubtful."""
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
    if plan is not None and isinstance(inputs.images, Drawing) and (cut := inputs.images.cut(plan)):
        warnings.append(f"{cut} of {len(plan.captions)} captions are longer than the model reads, and cut there")
    if inputs.clip is not None and plan is not None and plan.settings["ranked_by"] == inputs.clip.digest:
        warnings.append("the CLIP that judges has also chosen the pictures: its scores favor them")
    if inputs.evaluation.measure.features == "clip":
        warnings.append(report.NO_INCEPTION)
    return warnings
