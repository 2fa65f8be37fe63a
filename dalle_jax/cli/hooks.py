"""Hooks of the training loop that need more than training: samples of the model, and their scores.

Above `train`, `sample` and `evaluate`, which do not know one another.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dalle_jax import distributed, model_dir
from dalle_jax.data.record import Dropped
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.models import Model, build
from dalle_jax.models.layers import compute_dtype
from dalle_jax.pictures.picture import Picture
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.autoregressive import Autoregressive
from dalle_jax.sample.batches import free_bytes
from dalle_jax.sample.engine import weight_bytes, widest_mesh
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Request
from dalle_jax.sample.rerank import Reranker
from dalle_jax.text import Tokenizer, load_tokenizer
from dalle_jax.train.aside import Hook
from dalle_jax.train.settings import Evaluate, TrainSettings
from dalle_jax.train.step import ema_params

CAPTIONS, COLUMNS = 16, 8  # of a sheet


def hooks_of(settings: TrainSettings, workdir: pathlib.Path) -> list[Hook]:
    """The hooks of a training with these settings; none if its model draws no images from captions.

    Raises:
      UserError: an evaluation with a network that cannot be read.
    """
    evaluate = settings.run.evaluate
    if evaluate is None:
        return []
    hooks = [sample_hook(settings, workdir)]
    return [*hooks, evaluate_hook(settings, workdir)] if evaluate.every else hooks


def sample_hook(settings: TrainSettings, workdir: pathlib.Path) -> Hook:
    """Every `run.picture_every` steps, samples of held-out captions as WORKDIR/pictures/STEP.png; None: never.

    They are drawn with the moving average of the parameters, at temperature 1 and with the same seeds each time, so
    that the sheets of a run compare. The captions are the first of the validation source, or of the training source
    without one.
    """
    pictures_of = _sampler(settings, workdir, count=CAPTIONS)

    def draw(step: int, state) -> None:
        if pictures := pictures_of(step, state):
            images = [np.asarray(picture) for picture in pictures]
            sheet = contact_sheet(images, [picture.caption for picture in pictures], columns=COLUMNS)
            (workdir / "pictures").mkdir(exist_ok=True)
            sheet.save(workdir / "pictures" / f"{step:07d}.png")

    return settings.run.picture_every, draw


def evaluate_hook(settings: TrainSettings, workdir: pathlib.Path) -> Hook:
    """Every `run.evaluate.every` steps, the scores of `evaluate.probe` as samples/NAME in the metrics.

    One image for each of the first `count` captions, drawn as in `sample_hook`, against `reference_count` images of the
    same source.

    Raises:
      UserError: a network that cannot be read, or a source without images.
    """
    evaluate = settings.run.evaluate or Evaluate()
    pictures_of = _sampler(settings, workdir, count=evaluate.count)
    probe_of = _open_probe(_spec(settings), evaluate) if jax.process_index() == 0 else None

    def score(step: int, state) -> dict[str, float] | None:
        pictures = pictures_of(step, state)
        if probe_of is None:
            return None
        probe = probe_of(side=pictures[0].width)
        scores = probe.scores([np.asarray(picture) for picture in pictures], [picture.caption for picture in pictures])
        return {f"samples/{name}": value for name, value in scores.items()}

    return evaluate.every, score


def _open_probe(spec: str, evaluate: Evaluate) -> Callable:
    """Load what scores samples, before hours go by. Returns a function that makes the probe of an image size, once."""
    from dalle_jax.evaluate.features import Extractor  # most of SciPy, which every restart would pay
    from dalle_jax.evaluate.probe import Probe

    source = open_source(spec, captions_required=False)
    count = min(evaluate.reference_count, len(source))
    rows = np.sort(np.random.default_rng(0).choice(len(source), count, replace=False)).tolist()
    inception = Extractor.load(evaluate.weights) if evaluate.weights else None
    clip = Reranker.load(evaluate.clip) if evaluate.clip else None
    return functools.cache(functools.partial(Probe, source, rows=rows, inception=inception, clip=clip))


def _sampler(settings: TrainSettings, workdir: pathlib.Path, *, count: int) -> Callable[[int, Any], list[Picture]]:
    """A function that draws a picture for each of so many captions with the parameters of a training state.

    The moving average comes to the first process alone, layer by layer in the model's own precision, and is cut over
    its devices as far as the heads divide. It draws there and returns nothing in the others.

    Raises, when called:
      UserError: the weights do not fit beside the state.
    """

    @functools.cache
    def parts() -> tuple[model_dir.ModelDir, Tokenizer, list[str]]:
        image_tokenizer, tokenizer = model_dir.load_frozen(workdir, "image_tokenizer"), load_tokenizer(workdir)
        return image_tokenizer, tokenizer, first_captions(_spec(settings), count)

    def draw(step: int, state) -> list[Picture]:
        model, mesh = build("transformer", settings.model), widest_mesh(settings.model.heads, jax.local_devices())
        if problem := distributed.gather_json(_lack_of_room(model, mesh))[0]:
            raise UserError(problem)
        ema, params, dtype = state["ema"], state["params"], compute_dtype(settings.model.precision)

        def fetched(average, param, **how) -> np.ndarray | None:
            """One array at a time, as the average may lie in the hosts' memory and pass through the devices."""
            return distributed.whole_in_first(ema_params({"ema": average, "params": param}), **how)

        blocks = {
            name: fetched(ema["blocks"][name], param, dtype=dtype, by_rows=True)
            for name, param in params["blocks"].items()
        }
        ends = {n: fetched(ema[n], param, dtype=ema[n].dtype) for n, param in params.items() if n != "blocks"}
        if jax.process_index() != 0:
            return []
        image_tokenizer, tokenizer, captions = parts()
        whole = ends | {"blocks": {name: _Layers(array) for name, array in blocks.items() if array is not None}}
        generator = Autoregressive(
            model_dir.ModelDir({}, model, whole), image_tokenizer, tokenizer, digest=f"step {step}", mesh=mesh
        )
        requests = [Request(caption, seed=seed) for seed, caption in enumerate(captions)]
        return [pictures[0] for pictures in Pipeline(generator).draw(requests)]

    return draw


@dataclasses.dataclass(frozen=True)
class _Layers:
    """An array of all layers, perhaps in 16 bits, of which the engine takes one at a time in float32."""

    array: np.ndarray

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.array[layer].astype(np.float32)


def _lack_of_room(model: Model, mesh: jax.sharding.Mesh) -> str | None:
    """Why the weights do not fit beside the training state, None if they do."""
    free, wanted = min(map(free_bytes, mesh.local_devices)), weight_bytes(model, mesh)
    if wanted < free:
        return None
    return (
        f"expected {wanted / 1e9:.1f} GB free on each device for the weights to draw with, got {free / 1e9:.1f}: set "
        "config.run.picture_every and config.run.evaluate.every to None, and sample from the checkpoints elsewhere"
    )


def first_captions(spec: str, count: int) -> list[str]:
    """The first caption of each of the first records of a source that have one, `count` at most.

    Raises:
      UserError: there are none.
    """
    source, captions = open_source(spec, pictures_required=False), []
    for i in range(len(source)):
        record = source[i]
        if not isinstance(record, Dropped) and record.captions:
            captions.append(record.captions[0])
        if len(captions) == count:
            break
    if not captions:
        raise UserError(f"expected captions in {spec} to draw samples for, got none: give another source")
    return captions


def _spec(settings: TrainSettings) -> str:
    return settings.run.data.validation or settings.run.data.train or ""
