"""Functions that the training loop calls now and then and that need more than training: drawing samples.

Above both `train` and `sample`, so that neither needs to know the other.
"""

import pathlib

import jax
import ml_collections
import numpy as np

from dalle_jax import checkpoint, distributed
from dalle_jax.data.record import Record
from dalle_jax.data.sources import open_source
from dalle_jax.models import build
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.sheet import contact_sheet
from dalle_jax.tokenizer import Tokenizer
from dalle_jax.train.loop import Hook

CAPTIONS = 16
SHEET_SIDE = 128  # pixels that a small picture is enlarged to on the sheet, about


def sample_hook(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Hook:
    """Every `config.picture_every` updates, samples of held-out captions as WORKDIR/pictures/STEP.png.

    Draws with the moving average of the parameters, at temperature 1 and the same seeds each time, so that the sheets
    of a run compare. The captions are the first of the validation source, or of the training source without one.
    """
    parts = {}

    def draw(step: int, state) -> None:
        ema = distributed.whole(state["ema"])
        if jax.process_index() != 0:
            return
        if not parts:
            dvae_config, dvae_params = checkpoint.load_model_dir(workdir / "dvae", name="dvae")
            parts["dvae"] = build("dvae", dvae_config["model"]), dvae_params
            parts["tokenizer"] = Tokenizer.load(workdir)
            parts["model"] = build("transformer", checkpoint.read_config(workdir)["model"])  # text_vocab filled in
            parts["captions"] = _first_captions(config.data.validation or config.data.train)
        pipe = Pipeline(parts["model"], ema, *parts["dvae"], parts["tokenizer"], digest=f"step {step}")
        pictures = [np.asarray(row[0]) for row in pipe(parts["captions"], seed=list(range(len(parts["captions"]))))]
        scale = max(1, SHEET_SIDE // pipe.image_size)
        (workdir / "pictures").mkdir(exist_ok=True)
        contact_sheet(pictures, parts["captions"], columns=8, scale=scale).save(
            workdir / "pictures" / f"{step:07d}.png"
        )

    return config.picture_every or config.steps, draw


def _first_captions(spec: str) -> list[str]:
    source, captions = open_source(spec), []
    for i in range(len(source)):
        record = source[i]
        if isinstance(record, Record) and record.captions:
            captions.append(record.captions[0])
        if len(captions) == CAPTIONS:
            break
    return captions
