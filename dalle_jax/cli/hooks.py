"""Functions that the training loop calls now and then and that need more than training: drawing samples, scoring them.

Above `train`, `sample` and `evaluate`, so that none needs to know another.
"""

import pathlib

import jax
import numpy as np

from dalle_jax import distributed, model_dir
from dalle_jax.data.record import Dropped
from dalle_jax.data.sources import open_source
from dalle_jax.models import build
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.autoregressive import Autoregressive
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.rerank import Reranker
from dalle_jax.text import load_tokenizer
from dalle_jax.train.loop import Hook
from dalle_jax.train.settings import TrainSettings
from dalle_jax.train.step import ema_params

CAPTIONS = 16


def hooks_of(settings: TrainSettings, workdir: pathlib.Path) -> list[Hook]:
    """What a training with these settings does now and then.

    Raises:
      UserError: an evaluation with a network that cannot be read.
    """
    asked = settings.run.evaluate
    if asked is None:
        return []
    return [sample_hook(settings, workdir), *([evaluate_hook(settings, workdir)] if asked.every else [])]


def sample_hook(settings: TrainSettings, workdir: pathlib.Path) -> Hook:
    """Every `run.picture_every` updates, samples of held-out captions as WORKDIR/pictures/STEP.png.

    Draws with the moving average of the parameters, at temperature 1 and the same seeds each time, so that the sheets
    of a run compare. The captions are the first of the validation source, or of the training source without one.
    """
    sampler = _Sampler(settings, workdir, captions=CAPTIONS)

    def draw(step: int, state) -> None:
        pipe, captions, pictures = sampler.draw(step, state)
        if pipe is None:
            return
        (workdir / "pictures").mkdir(exist_ok=True)
        contact_sheet(pictures, captions, columns=8).save(workdir / "pictures" / f"{step:07d}.png")

    return settings.run.picture_every or settings.run.steps, draw


def evaluate_hook(settings: TrainSettings, workdir: pathlib.Path) -> Hook:
    """Every `run.evaluate.every` updates, the scores of `evaluate.probe` as samples/NAME in the metrics.

    One picture for each of the first `count` captions of the validation source, or of the training source without one,
    drawn as in `sample_hook`, against `reference_count` of its pictures.

    Raises:
      UserError: a network that cannot be read, or a source without pictures.
    """
    from dalle_jax.evaluate.features import Extractor  # most of SciPy, which every restart would pay
    from dalle_jax.evaluate.probe import Probe

    asked, data = settings.run.evaluate, settings.run.data
    sampler, parts = _Sampler(settings, workdir, captions=asked.count), {}
    if jax.process_index() == 0:  # before hours go by
        parts["source"] = open_source(data.validation or data.train, captions_required=False)
        parts["inception"] = Extractor.load(asked.weights) if asked.weights else None
        parts["clip"] = Reranker.load(asked.clip) if asked.clip else None

    def score(step: int, state) -> dict[str, float] | None:
        pipe, captions, pictures = sampler.draw(step, state)
        if pipe is None:
            return None
        if "probe" not in parts:
            source = parts["source"]
            count = min(asked.reference_count, len(source))
            rows = np.sort(np.random.default_rng(0).choice(len(source), count, replace=False))
            networks = {name: parts[name] for name in ("inception", "clip")}
            parts["probe"] = Probe(source, rows=rows, side=pipe.image_size, **networks)
        return {f"samples/{name}": value for name, value in parts["probe"].scores(pictures, captions).items()}

    return asked.every, score


class _Sampler:
    """Draws with the parameters of a training run in its first process; everything else of the model is read once."""

    def __init__(self, settings: TrainSettings, workdir: pathlib.Path, *, captions: int):
        self._workdir, self._settings, self._count = workdir, settings, captions
        self._captions: list[str] = []

    def draw(self, step: int, state) -> tuple[Pipeline | None, list[str], list[np.ndarray]]:
        """Pipeline, captions and a picture uint8 each; no pipeline on all processes but the first."""
        ema = distributed.whole(ema_params(state))
        if jax.process_index() != 0:
            return None, [], []
        if not self._captions:
            self._image_tokenizer = model_dir.load_frozen(self._workdir, "image_tokenizer")
            self._tokenizer = load_tokenizer(self._workdir)
            data = self._settings.run.data
            self._captions = _first_captions(data.validation or data.train, self._count)
        transformer = model_dir.ModelDir({}, build("transformer", self._settings.model), ema)
        generator = Autoregressive(transformer, self._image_tokenizer, self._tokenizer, digest=f"step {step}")
        pipe = Pipeline(generator)
        rows = pipe(self._captions, seed=list(range(len(self._captions))))
        return pipe, self._captions, [np.asarray(row[0]) for row in rows]


def _first_captions(spec: str, count: int) -> list[str]:
    source, captions = open_source(spec, pictures_required=False), []
    for i in range(len(source)):
        record = source[i]
        if not isinstance(record, Dropped) and record.captions:
            captions.append(record.captions[0])
        if len(captions) == count:
            break
    return captions
