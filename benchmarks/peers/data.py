"""Speed of the tar source next to the `webdataset` package, and of resuming deep in a large source.

    pip install webdataset && python -m benchmarks.peers.data

Both sides read the same generated shards in one process and do the same to a record: decode, augment for the
transformer (listing 2), tokenise with BPE dropout, stack to batches, shuffled. Ours is `data.pipeline.Batches` as
training uses it, with two decoding threads for photos and none for icons, which are decoded in less time than it
takes to hand the interpreter's lock over; theirs is webdataset's reader, shuffle buffer and decoder with our
augmentation and tokenizer as its map step. Each round measures every work once in turns; a ratio is the middle one of
the rounds.

Resuming: open a source of over a million records whose offset index is cached, set the position to record 1,000,000 of
its first epoch and take one batch. Writes the table and the raw seconds to `benchmarks/results/`.
"""

import argparse
import datetime
import functools
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dalle_jax.data import transforms
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare
from dalle_jax.data.sources import open_source
from dalle_jax.layout import Layout
from dalle_jax.text import Tokenizer
from dalle_jax.text.bpe import BPETokenizer

RESULTS = Path(__file__).parent.parent / "results"
BATCH, CPUS, DROPOUT = 32, 2, 0.1
# name -> (records, height, width, image format, size of the result, decoding threads)
SHARDS = {"photos": (400, 384, 512, "jpg", 256, 2), "icons": (4000, 64, 64, "png", 64, 0)}
LEAST_RATIO, MOST_RESUME_SECONDS, RESUME_AT = 1.0, 1.0, 1_000_000
WORDS = (
    "a red green blue yellow small large round square dog cat house tree boat star over under beside two old".split()
)


def make_shard(path: Path, *, records: int, height: int, width: int, suffix: str) -> None:
    """A shard of smooth random pictures with captions of 4 to 16 words, as img2dataset would write it."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(records):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
            caption = " ".join(rng.choice(WORDS, rng.integers(4, 17))).encode()
            meta = json.dumps({"key": f"{i:09d}", "status": "success", "width": width, "height": height}).encode()
            for extension, data in ((suffix, file.getvalue()), ("txt", caption), ("json", meta)):
                member = tarfile.TarInfo(f"{i:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def ours(path: Path, size: int, tokenizer: Tokenizer, layout: Layout, *, threads: int):
    """Batches without end, as training reads them."""
    config = DataConfig(image_size=size, augment="transformer", bpe_dropout=DROPOUT, threads=threads)
    prepare = Prepare(config, layout, tokenizer)
    return Batches(open_source(f"wds:{path}"), prepare, batch_size=BATCH, seed=0, shuffle=True, epochs=None)


def theirs(path: Path, size: int, tokenizer: Tokenizer, layout: Layout):
    """The same from webdataset."""
    import webdataset

    rng = np.random.default_rng(0)

    def prepare(sample):
        image, caption = sample
        tokens = tokenizer.encode(caption, dropout=DROPOUT, rng=rng)
        return transforms.augment_transformer(image, size, rng), layout.caption_ids(tokens)

    dataset = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(1000).decode("rgb8")
    return iter(dataset.to_tuple("jpg;png", "txt").map(prepare).repeat().batched(BATCH))


def images_per_second(batches, *, warm_up: int, count: int) -> float:
    for _ in range(warm_up):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def resume_seconds(folder: Path, tokenizer: Tokenizer, layout: Layout) -> dict[str, float]:
    """Seconds to index a million records once, to open them again, and to resume at RESUME_AT up to the first batch."""
    make_shard(folder / "tiny.tar", records=10_100, height=16, width=16, suffix="png")
    for i in range(100):  # one file under a hundred names: the index and the reads do not know
        os.link(folder / "tiny.tar", folder / f"many-{i:03d}.tar")
    seconds = {}
    for name in ("index once", "open again"):
        start = time.perf_counter()
        source = open_source(f"wds:{folder}/many-*.tar")
        seconds[name] = time.perf_counter() - start
    config = DataConfig(image_size=16, augment="transformer", bpe_dropout=DROPOUT, threads=CPUS)
    prepare = Prepare(config, layout, tokenizer)
    batches = Batches(source, prepare, batch_size=BATCH, seed=0, shuffle=True, epochs=None)
    state = batches.get_state()
    state["position"]["next_index"] = RESUME_AT
    start = time.perf_counter()
    batches.set_state(state)
    next(batches)
    seconds["resume"] = time.perf_counter() - start
    batches.close()
    return {"records": len(source), **seconds}


def measure(folder: Path, rounds: int) -> dict:
    tokenizer = BPETokenizer.train([" ".join(WORDS)] * 10, vocab_size=512)
    layout = Layout(text_len=64, text_vocab=512, grid=8, image_vocab=512)
    rates = {}
    for name, (records, height, width, suffix, size, threads) in SHARDS.items():
        path = folder / f"{name}.tar"
        make_shard(path, records=records, height=height, width=width, suffix=suffix)
        rates[name] = {"ours": [], "webdataset": []}
        for _ in range(rounds):
            for side, start in (("ours", functools.partial(ours, threads=threads)), ("webdataset", theirs)):
                batches = start(path, size, tokenizer, layout)
                rates[name][side].append(images_per_second(batches, warm_up=4, count=records // BATCH))
                if side == "ours":
                    batches.close()
    return {"images_per_second": rates, "resume_seconds": resume_seconds(folder, tokenizer, layout)}


def summarise(result: dict) -> list[dict]:
    """One row a bar: what, ours, theirs, the figure of the bar and whether it is met."""
    rows = []
    for name, sides in result["images_per_second"].items():
        ratios = [a / b for a, b in zip(sides["ours"], sides["webdataset"], strict=True)]
        middle = statistics.median(ratios)
        rows.append(
            {
                "what": f"{name}, images/s",
                "ours": f"{statistics.median(sides['ours']):,.0f}",
                "theirs": f"{statistics.median(sides['webdataset']):,.0f}",
                "figure": f"{middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
                "bar": f"at least {LEAST_RATIO:g}x",
                "met": middle >= LEAST_RATIO,
            }
        )
    seconds = result["resume_seconds"]
    total = seconds["open again"] + seconds["resume"]
    rows.append(
        {
            "what": f"open {seconds['records']:,} records and resume at {RESUME_AT:,}",
            "ours": f"{seconds['open again']:.2f} + {seconds['resume']:.2f} s",
            "theirs": "",
            "figure": f"{total:.2f} s",
            "bar": f"under {MOST_RESUME_SECONDS:g} s",
            "met": total < MOST_RESUME_SECONDS,
        }
    )
    return rows


def table(result: dict) -> str:
    """The result as markdown."""
    shapes = "; ".join(
        f"{name}: {h} x {w} {suffix} to {size}, {threads} decoding thread(s)"
        for name, (_, h, w, suffix, size, threads) in SHARDS.items()
    )
    lines = [
        "# Speed of the data pipeline",
        "",
        f"{result['date']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.",
        f"{shapes}; batch {BATCH}. Indexing {result['resume_seconds']['records']:,} records once took "
        f"{result['resume_seconds']['index once']:.1f} s.",
        "",
        f"    {result['command']}",
        "",
        "| what | ours | webdataset | figure (lowest and highest round) | bar |",
        "|---|---|---|---|---|",
    ]
    for row in result["bars"]:
        met = "met" if row["met"] else "not met"
        lines.append(f"| {row['what']} | {row['ours']} | {row['theirs']} | {row['figure']} | {row['bar']}: {met} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    import webdataset

    machine = {
        "cpus": CPUS,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DALLE_JAX_CACHE"] = f"{folder}/cache"
        result = {
            "date": datetime.date.today().isoformat(),
            "command": f"python -m benchmarks.peers.data --rounds {args.rounds}",
            "machine": machine,
            **measure(Path(folder), args.rounds),
        }
    result["bars"] = summarise(result)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "data.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "data.md").write_text(table(result))
    print(table(result))
    return 0 if all(row["met"] for row in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
