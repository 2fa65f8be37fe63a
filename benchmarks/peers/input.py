"""Speed of the input on one core, next to webdataset and torch's DataLoader; how long the demo's update waits for it.

    python -m benchmarks.peers.input rates --photos folder:PHOTOS --icons 'wds:EMOJI/*.tar' --peer-python PYTHON
    python -m benchmarks.peers.input stall

`rates`: decode, crop at random to the size, cut the caption with BPE dropout, batch. Ours is `data.pipeline.Batches` as
training reads it (listing 2 of the paper, areas averaged exactly); theirs is `input_peers.py`, as their users write it,
in a Python that has torch, webdataset and tokenizers. Both read the same files, shuffled, in one process on one core.
Each round measures every side once in turns; a ratio is the middle one of the rounds. `large photos` are the photos
enlarged to 768 pixels on the shorter side, as JPEG of quality 90; `scaled` is `data.scaled_jpeg`, which decodes at a
half, a quarter or an eighth where that is enough; its mean difference from exact crops is measured, in levels of 255.
A second table says what a picture's time goes into: its parts one after another, and the whole less these.

`stall`: trains the demo's transformer with a random dVAE and reads `data` in the ledger of goodput, the time in which
the device had nothing to do because the next batch was not there.

Writes `input.md` and `input.json` to `benchmarks/results/`, of what was measured last each.
"""

import argparse
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers.peers import machine
from dalle_jax import model_dir
from dalle_jax.cli import host_memory
from dalle_jax.data import transforms
from dalle_jax.data.decode import decode_scaled
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare
from dalle_jax.data.record import Record
from dalle_jax.data.sources import open_source
from dalle_jax.layout import Layout
from dalle_jax.text import Tokenizer
from dalle_jax.text.bpe import BPETokenizer

RESULTS = Path(__file__).parent.parent / "results"
BATCH, DROPOUT, LEAST_RATIO, MOST_STALL = 32, 0.1, 1.5, 0.01
PARTS = ("read", "decode", "crop and shrink", "tokens", "decode by Pillow")
RECORDS = {"photos": 1024, "icons": 4096, "large photos": 512}  # repeated where there are fewer
SIZES = {"photos": (256, 64), "icons": (64,), "large photos": (256,)}
BATCHES = {"photos": 8, "icons": 32, "large photos": 4}  # of one measurement
LARGE = 768
STALL_UPDATES = 300


def write_forms(records: list[Record], folder: Path, *, count: int) -> None:
    """The records as FOLDER.tar and as a folder of files, again from the start until there are `count`."""
    folder.mkdir()
    with tarfile.open(f"{folder}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            record = records[i % len(records)]
            suffix = "png" if record.image.startswith(b"\x89PNG") else "jpg"
            for name, data in ((suffix, record.image), ("txt", "\n".join(record.captions).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                (folder / member.name).write_bytes(data)


def usable(spec: str, most: int) -> list[Record]:
    source = open_source(spec)
    records = (source[i] for i in range(len(source)))
    return [record for record in records if isinstance(record, Record)][:most]


def enlarged(record: Record) -> Record:
    image = Image.open(io.BytesIO(record.image)).convert("RGB")
    scale, file = LARGE / min(image.size), io.BytesIO()
    image.resize([round(scale * side) for side in image.size], Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return Record(record.key, file.getvalue(), record.captions)


def ours(spec: str, size: int, tokenizer: Tokenizer, **values) -> Batches:
    layout = Layout(text_len=64, text_vocab=tokenizer.vocab_size, grid=8, image_vocab=512)
    config = DataConfig(image_size=size, augment="transformer", bpe_dropout=DROPOUT, threads=0, **values)
    prepare = Prepare(config, layout, tokenizer)
    return Batches(open_source(spec), prepare, batch_size=BATCH, seed=0, shuffle=True, epochs=None)


class Ours:
    def __init__(self, *args, **kwargs):
        self._batches = ours(*args, **kwargs)
        next(self._batches)

    def rate(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            next(self._batches)
        return count * BATCH / (time.perf_counter() - began)


def parts(spec: str, size: int, tokenizer: Tokenizer, count: int, *, scaled_jpeg: bool = False) -> dict[str, float]:
    """Milliseconds of a picture for each part of our way, and for Pillow's decoder; means of `count` records."""
    source, rng = open_source(spec), np.random.default_rng(0)
    shortest = transforms.shortest("transformer", size) if scaled_jpeg else 0
    chosen = [int(index) for index in rng.permutation(len(source))[:count]]
    times = []
    for index in chosen:
        marks = [time.perf_counter()]
        record = source[index]
        marks.append(time.perf_counter())
        pixels, _ = decode_scaled(record.image, shortest=shortest)
        marks.append(time.perf_counter())
        transforms.augment_transformer(pixels, size, rng)
        marks.append(time.perf_counter())
        tokenizer.encode(record.captions[0], dropout=DROPOUT, rng=rng)
        marks.append(time.perf_counter())
        times.append(np.diff(marks))
    images = [source[index].image for index in chosen]
    began = time.perf_counter()
    for image in images:
        np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    pillow = (time.perf_counter() - began) / len(images)
    return dict(zip(PARTS, (1e3 * np.array([*np.mean(times, axis=0), pillow])).tolist(), strict=True))


class Theirs:
    """A peer that waits in its own process until it is asked."""

    def __init__(self, python: str, *words):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.input_peers", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=RESULTS.parent.parent,
        )
        self.versions = self._process.stdout.readline().strip()

    def rate(self, count: int) -> float:
        print(count, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def difference(records: list[Record], size: int) -> float:
    """Mean over pixels of |scaled - exact|, of levels 0 .. 255, for the same square, whose corner both can name."""
    shortest, differences = transforms.shortest("transformer", size), []
    for record in records:
        exact, scaled = (decode_scaled(record.image, shortest=least)[0] for least in (0, shortest))
        scale = round(max(exact.shape) / max(scaled.shape))
        side = min(exact.shape[:2]) // scale
        if side >= size:
            squares = exact[: scale * side, : scale * side], scaled[:side, :side]
            crops = [transforms.shrink_by_area(square, size).astype(np.float32) for square in squares]
            differences.append(np.abs(crops[0] - crops[1]).mean())
    return float(np.mean(differences))


def measure_rates(args: argparse.Namespace) -> dict:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    host_memory.keep_freed()
    photos = usable(args.photos, RECORDS["photos"])
    sets = {"photos": photos, "icons": usable(args.icons, RECORDS["icons"]), "large photos": [*map(enlarged, photos)]}
    rates, spent, differences, versions = {}, {}, {}, ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DALLE_JAX_CACHE"] = f"{name}/cache"
        captions = [text for records in sets.values() for record in records for text in record.captions]
        (folder / "captions.txt").write_text("\n".join(captions))
        tokenizer = BPETokenizer.train(captions, vocab_size=2048)
        for kind, records in sets.items():
            write_forms(records, folder / kind, count=RECORDS[kind])
            tar, files = f"{folder / kind}.tar", folder / kind
            for size in SIZES[kind]:
                sides = {
                    "ours, tar": Ours(f"wds:{tar}", size, tokenizer),
                    "webdataset": Theirs(args.peer_python, "webdataset", tar, size, folder / "captions.txt"),
                    "ours, folder": Ours(f"folder:{files}", size, tokenizer),
                    "torch": Theirs(args.peer_python, "torch", files, size, folder / "captions.txt"),
                }
                if kind != "icons":
                    sides["ours, tar, scaled"] = Ours(f"wds:{tar}", size, tokenizer, scaled_jpeg=True)
                    sides["ours, folder, scaled"] = Ours(f"folder:{files}", size, tokenizer, scaled_jpeg=True)
                    differences[f"{kind} to {size}"] = difference(records, size)
                found = {side: [] for side in sides}
                for _ in range(args.rounds):
                    for side, one in sides.items():
                        found[side].append(one.rate(BATCHES[kind]))
                for side in (sides["webdataset"], sides["torch"]):
                    versions = side.versions
                    side.close()
                rates[f"{kind} to {size}"] = found
                for side, spec in (("tar", f"wds:{tar}"), ("folder", f"folder:{files}")):
                    for how, scaled in (("", False), (", scaled", True)):
                        if f"ours, {side}{how}" in found:
                            count = BATCHES[kind] * BATCH
                            spent[f"{kind} to {size}, {side}{how}"] = {
                                **parts(spec, size, tokenizer, count, scaled_jpeg=scaled),
                                "whole": 1e3 / statistics.median(found[f"ours, {side}{how}"]),
                            }
    return {
        "machine": here() | {"peers": versions},
        "images_per_second": rates,
        "milliseconds": spent,
        "differences": differences,
    }


def measure_stall() -> dict:
    import jax

    from dalle_jax import config as configs
    from dalle_jax.cli.demo import make_tokenizer
    from dalle_jax.models import build
    from dalle_jax.train.run import train

    host_memory.keep_freed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dvae = configs.load("configs/dvae.py:demo").model.to_dict()
        params = jax.device_get(jax.jit(build("dvae", dvae).init)(jax.random.key(0)))
        model_dir.save(folder / "dvae", {"name": "dvae", "model": dvae}, params)
        values = {
            "dvae": folder / "dvae", "tokenizer": make_tokenizer(folder), "steps": STALL_UPDATES, "validate_every": 0,
            "picture_every": 0, "checkpoint_every": 0,
        }  # fmt: skip
        words = [f"--config.{key}={value}" for key, value in values.items()]
        train(configs.load("configs/transformer.py:demo", words), folder / "run", progress=False)
        seconds = json.loads((folder / "run" / "goodput.json").read_text())["seconds"]
    return {"machine": here(), "updates": STALL_UPDATES, "seconds": seconds}


def here() -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        **machine(),
        "threads": len(os.sched_getaffinity(0)),
        "pillow": Image.__version__,
    }


def table(result: dict) -> str:
    """The results as markdown."""
    lines = ["# Speed of the input", ""]
    if rates := result.get("rates"):
        lines += [
            "Images a second on one core, ours beside webdataset and torch's DataLoader as their users write them; a",
            f"ratio is the middle one of the rounds (lowest and highest). {described(rates['machine'])}.",
            "",
            f"    {rates['command']}",
            "",
            f"| what | ours | theirs | ratio, at least {LEAST_RATIO:g}x is the aim | |",
            "|---|---|---|---|---|",
        ]
        for what, found in rates["images_per_second"].items():
            for side, peer in (("tar", "webdataset"), ("folder", "torch")):
                for how in ("", ", scaled"):
                    if f"ours, {side}{how}" in found:
                        lines.append(_row(what, found[f"ours, {side}{how}"], found[peer], peer, side, how))
        lines += [
            "",
            "Milliseconds of one picture on our side; rest: order, filters, padding, batching and memory that is cold.",
            "",
            f"| what | {' | '.join(PARTS[:-1])} | rest | whole | {PARTS[-1]} |",
            "|---" * (len(PARTS) + 3) + "|",
        ]
        for what, spent in rates["milliseconds"].items():
            own = [spent[part] for part in PARTS[:-1]]
            cells = [*own, spent["whole"] - sum(own), spent["whole"], spent[PARTS[-1]]]
            lines.append(f"| {what} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        listed = ", ".join(f"{what} {value:.2f}" for what, value in rates["differences"].items())
        lines += ["", f"Mean difference of a scaled picture from the exact one, in levels of 255: {listed}.", ""]
    if stall := result.get("stall"):
        seconds = stall["seconds"]
        part = seconds["data"] / (seconds["data"] + seconds["step"])
        lines += [
            f"The demo's transformer, {stall['updates']} updates: waited {seconds['data']:.2f} s for data in "
            f"{seconds['step']:.1f} s of",
            f"updates, {part:.2%} (aim: under {MOST_STALL:.0%}, {'met' if part < MOST_STALL else 'not met'}). "
            f"{described(stall['machine'])}.",
            "",
            f"    {stall['command']}",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _row(what: str, own: list[float], other: list[float], peer: str, side: str, how: str) -> str:
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    middle = statistics.median(ratios)
    met = "met" if middle >= LEAST_RATIO else "not met"
    return (
        f"| {what}, {side}{how} | {statistics.median(own):,.0f} | {peer} {statistics.median(other):,.0f} | "
        f"{middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | {met} |"
    )


def described(machine: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "stall"))
    parser.add_argument("--photos", help="source of JPEG photos with captions, e.g. folder:DIR")
    parser.add_argument("--icons", help="source of small PNG pictures with captions, e.g. wds:PATTERN")
    parser.add_argument("--peer-python", help="a Python with torch, webdataset and tokenizers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what == "rates":
        if not (args.photos and args.icons and args.peer_python):
            parser.error("rates needs --photos, --icons and --peer-python")
        command = (
            "python -m benchmarks.peers.input rates --photos folder:PHOTOS --icons 'wds:EMOJI/*.tar' "
            "--peer-python PYTHON"
        )
        found = {"command": f"{command} --rounds {args.rounds}", **measure_rates(args)}
    else:
        found = {"command": "python -m benchmarks.peers.input stall", **measure_stall()}
    path = args.out / "input.json"
    args.out.mkdir(parents=True, exist_ok=True)
    result = (json.loads(path.read_text()) if path.exists() else {}) | {args.what: found}
    path.write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "input.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
