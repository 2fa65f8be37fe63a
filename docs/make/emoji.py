"""Do captions help, and on which image tokens? Figures and pictures of runs on captioned pictures, side by side.

    python docs/make/emoji.py --run dvae=RUN --run vq=RUN2 --train 'wds:DATA/train/*.tar' \
        --held-out val_combo='wds:DATA/val_combo/*.tar' --out docs/emoji

A run must have been trained with `--config.data.caption_dropout`, so that its model also knows pictures without a
caption. For each held-out source: bits of a picture with its caption and with none under the same model, the gain
picture by picture with its standard error, and a unigram over the training pictures' image tokens (add-one smoothed).
Bits of runs on different image tokens do not compare; their gains do. It writes OUT/figures.json, and
OUT/RUN_SOURCE.png with the first draws for held-out captions.
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import platform
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import model_dir
from dalle_jax.checkpoint import reader
from dalle_jax.data.pipeline import Batches, Prepare
from dalle_jax.data.sources import open_source
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.text import load_tokenizer
from dalle_jax.train.objectives import build_task
from dalle_jax.train.run import load_frozen
from dalle_jax.train.settings import TrainSettings

SAMPLES, COLUMNS, BATCH = 32, 8, 16


class Run:
    """A trained workdir, ready to be measured."""

    def __init__(self, folder: pathlib.Path):
        self.settings = TrainSettings.of(model_dir.read_config(folder))
        self.task = build_task(self.settings, load_frozen(self.settings, folder))
        self.params = jax.device_put(model_dir.load(folder, name="transformer").params)
        self.frozen = jax.device_put(self.task.frozen)
        self.layout = self.task.model.config.layout
        self.tokenizer = load_tokenizer(folder)
        self.steps = reader.complete_steps(folder)[-1]
        self.pipe = Pipeline.load(folder)

    def batches(self, spec: str):
        return Batches(
            open_source(spec),
            Prepare(self.settings.data.without_randomness(), self.layout, self.tokenizer),
            batch_size=BATCH,
            seed=0,
            shuffle=False,
            epochs=1,
        )

    def bits(self, spec: str) -> np.ndarray:
        """Of each held-out picture, with its caption and with none: float [2, pictures]."""

        def one(example):
            single = {name: value[None] for name, value in example.items()}
            return self.task.loss(self.params, self.frozen, single, key=jax.random.key(0), step=0)[1]

        no_caption = jnp.asarray(self.layout.caption_ids([]))

        @jax.jit
        @jax.vmap
        def measure(example):
            given = (example, example | {"text": no_caption})
            return [one(each)["bits_per_image_token"] * self.layout.image_len for each in given]

        return np.concatenate([np.stack(measure(batch)) for batch in self.batches(spec)], axis=1)

    def codes(self, spec: str) -> np.ndarray:
        return np.concatenate([self.pipe.encode(batch["image"]) for batch in self.batches(spec)])

    def draw(self, spec: str, *, temperature: float):
        """A sheet of first draws for captions that are spread over the source."""
        source = open_source(spec)
        captions = [source[i].captions[0] for i in np.linspace(0, len(source) - 1, SAMPLES).astype(int)]
        rows = self.pipe(captions, temperature=temperature, seed=list(range(SAMPLES)))
        return contact_sheet([np.asarray(row[0]) for row in rows], captions, columns=COLUMNS)


def unigram_bits(train_codes: np.ndarray, held_out_codes: np.ndarray, vocab: int) -> float:
    """Bits per token of held-out codes under the frequencies of the training codes, every code counted once more."""
    counts = collections.Counter(train_codes.ravel().tolist())
    total = sum(counts.values()) + vocab
    return float(np.mean([-math.log2((counts[code] + 1) / total) for code in held_out_codes.ravel().tolist()]))


def measured(run: Run, train: str, sources: dict[str, str]) -> dict:
    train_codes, rows = run.codes(train), {}
    for name, spec in sources.items():
        captioned, plain = run.bits(spec)
        gain = plain - captioned  # picture by picture
        unigram = unigram_bits(train_codes, run.codes(spec), run.settings.model.image_vocab)
        rows[name] = {
            "pictures": len(gain),
            "bits": float(captioned.mean()),
            "bits_without_caption": float(plain.mean()),
            "gain": float(gain.mean()),
            "gain_standard_error": float(gain.std(ddof=1) / math.sqrt(len(gain))),
            "gain_share_of_pictures": float((gain > 0).mean()),
            "unigram_bits": unigram * run.layout.image_len,
        }
    return {
        "held_out": rows,
        "steps": run.steps,
        "parameters": run.pipe.generator.model.num_params,
        "checkpoint": run.pipe.digest,
    }


def named(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--train", required=True)
    parser.add_argument("--held-out", action="append", required=True, metavar="NAME=SOURCE")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sources, runs = named(args.held_out), {}
    for name, folder in named(args.run).items():
        run = Run(pathlib.Path(folder))
        runs[name] = measured(run, args.train, sources)
        for source, spec in sources.items():
            run.draw(spec, temperature=args.temperature).save(args.out / f"{name}_{source}.png")
            row = runs[name]["held_out"][source]
            print(f"{name} {source}:", ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    result = {
        "runs": runs,
        "temperature": args.temperature,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": shlex.join(["python", *sys.argv]),
    }
    (args.out / "figures.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
