"""Do captions help? Figures and pictures of a run on captioned pictures, next to its two baselines.

    python docs/make/emoji.py shuffle 'DATA/train/*.tar' --out SHUFFLED
    python docs/make/emoji.py figures --run RUN --shuffled-run RUN2 --train 'wds:DATA/train/*.tar' \
        --held-out NAME=wds:DATA/val/*.tar --out docs/emoji

`shuffle` writes the shards again with the captions of another record each (a fixed permutation over all records), so
that the same training command makes a model that learned nothing from captions. `figures` measures bits per image token
on each held-out source for the run, the shuffled run (and the gain over it, picture by picture, with its standard
error) and a unigram over the training pictures' codes (add-one smoothed), and draws samples for the first held-out
captions. It writes OUT/figures.json and OUT/NAME.png.
"""

import argparse
import collections
import datetime
import glob
import io
import json
import math
import pathlib
import platform
import shlex
import sys
import tarfile

import jax
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


def shuffle(pattern: str, out: pathlib.Path, *, seed: int = 0) -> int:
    """Rewrites every shard with permuted captions; returns the number of records. Fixed points are moved on."""
    shards = sorted(glob.glob(pattern))
    captions = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    captions[shard, member.name] = tar.extractfile(member).read()
    keys = list(captions)
    order = np.random.default_rng(seed).permutation(len(keys))
    following = {keys[order[i]]: captions[keys[order[(i + 1) % len(keys)]]] for i in range(len(keys))}
    out.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        with tarfile.open(shard) as tar, tarfile.open(out / pathlib.Path(shard).name, "w") as copy:
            for member in tar:
                data = following.get((shard, member.name))
                if data is None and not member.name.endswith(".json"):
                    data = tar.extractfile(member).read()
                if data is not None:
                    member.size = len(data)
                    copy.addfile(member, io.BytesIO(data))
    return len(keys)


class Run:
    """A trained workdir, ready to be measured."""

    def __init__(self, folder: pathlib.Path):
        self.settings = TrainSettings.of(model_dir.read_config(folder))
        self.task = build_task(self.settings, load_frozen(self.settings, folder))
        self.params = jax.device_put(model_dir.load(folder, name="transformer").params)
        self.frozen = jax.device_put(self.task.frozen)
        self.tokenizer = load_tokenizer(folder)
        self.steps = reader.complete_steps(folder)[-1]

    def batches(self, spec: str):
        return Batches(
            open_source(spec),
            Prepare(self.settings.data.without_randomness(), self.task.model.config.layout, self.tokenizer),
            batch_size=BATCH,
            seed=0,
            shuffle=False,
            epochs=1,
        )

    def bits_per_image_token(self, spec: str) -> np.ndarray:
        """Of each held-out picture: float [pictures]."""

        def one(example):
            single = {name: value[None] for name, value in example.items()}
            return self.task.loss(self.params, self.frozen, single, key=jax.random.key(0), step=0)[1]

        measure = jax.jit(jax.vmap(lambda example: one(example)["bits_per_image_token"]))
        return np.concatenate([np.asarray(measure(batch)) for batch in self.batches(spec)])

    def codes(self, spec: str, pipe: Pipeline) -> list[np.ndarray]:
        return [pipe.encode(batch["image"]) for batch in self.batches(spec)]


def unigram_bits(train_codes: list[np.ndarray], held_out_codes: list[np.ndarray], vocab: int) -> float:
    """Bits per token of held-out codes under the frequencies of the training codes, every code counted once more."""
    counts = collections.Counter(np.concatenate([c.ravel() for c in train_codes]).tolist())
    total = sum(counts.values()) + vocab
    bits = [-math.log2((counts[int(code)] + 1) / total) for c in held_out_codes for code in c.ravel()]
    return sum(bits) / len(bits)


def figures(args: argparse.Namespace) -> dict:
    run, shuffled = Run(args.run), Run(args.shuffled_run)
    pipe = Pipeline.load(args.run)
    args.out.mkdir(parents=True, exist_ok=True)
    train_codes = run.codes(args.train, pipe)
    result = {"held_out": {}}
    for item in args.held_out:
        name, spec = item.split("=", 1)
        held_out = run.codes(spec, pipe)
        bits, without = run.bits_per_image_token(spec), shuffled.bits_per_image_token(spec)
        gain = without - bits  # picture by picture
        result["held_out"][name] = {
            "pictures": len(bits),
            "bits_per_image_token": float(bits.mean()),
            "captions_shuffled": float(without.mean()),
            "gain": float(gain.mean()),
            "gain_standard_error": float(gain.std(ddof=1) / math.sqrt(len(gain))),
            "gain_share_of_pictures": float((gain > 0).mean()),
            "unigram": unigram_bits(train_codes, held_out, pipe.generator.model.config.image_vocab),
        }
        source = open_source(spec)
        captions = [source[i].captions[0] for i in np.linspace(0, len(source) - 1, SAMPLES).astype(int)]
        drawn = [np.asarray(row[0]) for row in pipe(captions, temperature=args.temperature, seed=list(range(SAMPLES)))]
        contact_sheet(drawn, captions, columns=COLUMNS).save(args.out / f"{name}.png")
    return result | {
        "steps": {"run": run.steps, "captions_shuffled": shuffled.steps},
        "parameters": {
            "transformer": pipe.generator.model.num_params,
            "dvae": pipe.generator.image_tokenizer.model.num_params,
        },
        "temperature": args.temperature,
        "checkpoint": pipe.digest,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": shlex.join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    child = verbs.add_parser("shuffle")
    child.add_argument("pattern")
    child.add_argument("--out", type=pathlib.Path, required=True)
    child = verbs.add_parser("figures")
    child.add_argument("--run", type=pathlib.Path, required=True)
    child.add_argument("--shuffled-run", type=pathlib.Path, required=True)
    child.add_argument("--train", required=True)
    child.add_argument("--held-out", action="append", required=True, metavar="NAME=SOURCE")
    child.add_argument("--temperature", type=float, default=0.8)
    child.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if args.verb == "shuffle":
        print(f"{shuffle(args.pattern, args.out)} records with shuffled captions in {args.out}")
        return
    result = figures(args)
    (args.out / "figures.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, row in result["held_out"].items():
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
