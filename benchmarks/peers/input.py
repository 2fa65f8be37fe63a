"""Speed of the input on one core, next to webdataset and torch's DataLoader; resuming; how long updates wait for data.

    python -m benchmarks.peers.input rates --photos folder:PHOTOS --icons 'wds:EMOJI/*.tar' --peer-python PYTHON
    python -m benchmarks.peers.input resume
    python -m benchmarks.peers.input stall

`rates`: decode, crop at random to the size, cut the caption with BPE dropout, batch. Ours is `data.pipeline.Batches` as
training reads it (listing 2 of the paper, areas averaged exactly); theirs is `peer_loaders.py`, as their users write
it, in a Python that has torch, webdataset and tokenizers. Both read the same files, shuffled, in one process on one
core. `large photos` are the photos enlarged to 768 pixels on the shorter side, as JPEG of quality 90; `scaled` is
`data.scaled_jpeg`, which decodes at a half, a quarter or an eighth where that is enough. A second table says
what a picture's time goes into.

`resume`: open a source of over a million records whose offset index is cached, set the position to record 1,000,000 of
its first epoch and take one batch.

`stall`: trains the demo's transformer with a random dVAE and reads `data` in the ledger of goodput, the time in which
the device had nothing to do because the next batch was not there.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.peers.process import PeerProcess
from dalle_jax.data import transforms
from dalle_jax.data.decode import decode_scaled
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare, Reading
from dalle_jax.data.record import Record
from dalle_jax.data.sources import open_source
from dalle_jax.layout import Layout
from dalle_jax.text import Tokenizer
from dalle_jax.text.bpe import BPETokenizer

BATCH, DROPOUT, VOCAB = 32, 0.1, 2048
MIN_RATIO, MAX_RESUME_SECONDS, MAX_STALL = 1.5, 1.0, 0.01
PARTS = ("read", "decode", "crop and shrink", "tokens", "decode by Pillow")
RECORDS = {"photos": 1024, "icons": 4096, "large photos": 512}  # repeated where there are fewer
SIZES = {"photos": (256, 64), "icons": (64,), "large photos": (256,)}
BATCHES = {"photos": 8, "icons": 32, "large photos": 4}  # of one measurement
LARGE = 768
SHARDS, RESUME_AT = 100, 1_000_000
STALL_STEPS = 300


def read(spec: str, size: int, tokenizer: Tokenizer, **values) -> Batches:
    """Batches without end, as training reads them."""
    layout = Layout(text_len=64, text_vocab=tokenizer.vocab_size, grid=8, image_vocab=512)
    config = DataConfig(image_size=size, augment="transformer", bpe_dropout=DROPOUT, **values)
    prepare = Prepare(config, layout, tokenizer)
    reading = Reading(threads=0)
    return Batches(open_source(spec), prepare, batch_size=BATCH, seed=0, shuffle=True, epochs=None, reading=reading)


def write_tar(path: Path, records: Iterable[Record], folder: Path | None = None) -> None:
    """The records as a shard, and as files in `folder`."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, record in enumerate(records):
            suffix = "png" if record.image.startswith(b"\x89PNG") else "jpg"
            for name, data in ((suffix, record.image), ("txt", "\n".join(record.captions).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                if folder:
                    (folder / member.name).write_bytes(data)


def usable(spec: str, count: int) -> list[Record]:
    source = open_source(spec)
    records = (source[i] for i in range(len(source)))
    return [record for record in records if isinstance(record, Record)][:count]


def enlarged(record: Record) -> Record:
    image = Image.open(io.BytesIO(record.image)).convert("RGB")
    scale, file = LARGE / min(image.size), io.BytesIO()
    image.resize([round(scale * side) for side in image.size], Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return Record(record.key, file.getvalue(), record.captions)


def parts(spec: str, size: int, tokenizer: Tokenizer, count: int, *, scaled_jpeg: bool) -> list[float]:
    """Milliseconds of a picture for each of PARTS; means of `count` records."""
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
    files = [io.BytesIO(source[index].image) for index in chosen]
    pillow = harness.seconds(lambda: [np.asarray(Image.open(file).convert("RGB")) for file in files]) / len(files)
    return (1e3 * np.array([*np.mean(times, axis=0), pillow])).tolist()


def rates(args, folder: Path) -> list[str]:
    """Every kind and size: our ways and the peers in turns."""
    photos = usable(args.photos, RECORDS["photos"])
    sets = {"photos": photos, "icons": usable(args.icons, RECORDS["icons"]), "large photos": [*map(enlarged, photos)]}
    captions = [text for records in sets.values() for record in records for text in record.captions]
    (folder / "captions.txt").write_text("\n".join(captions))
    tokenizer = BPETokenizer.train(captions, vocab_size=VOCAB)
    compared, spent, about = [], [], ""
    for kind, records in sets.items():
        places = {"tar": folder / f"{kind}.tar", "folder": folder / kind}
        places["folder"].mkdir()
        repeated = (records[i % len(records)] for i in range(RECORDS[kind]))
        write_tar(places["tar"], repeated, places["folder"])
        specs = {"tar": f"wds:{places['tar']}", "folder": f"folder:{places['folder']}"}
        for size in SIZES[kind]:
            what, count = f"{kind} to {size}", BATCHES[kind]
            ways = [(form, scaled) for form in specs for scaled in (False, True) if kind != "icons" or not scaled]
            works, theirs = {}, {}
            for form, peer in (("tar", "webdataset"), ("folder", "torch")):
                words = (peer, places[form], size, folder / "captions.txt")
                theirs[form] = PeerProcess(args.peer_python, "peer_loaders", *words)
                works[peer, form] = lambda process=theirs[form], count=count: process.ask(count)["rate"]
            for form, scaled in ways:
                batches = read(specs[form], size, tokenizer, scaled_jpeg=scaled)
                next(batches)
                works[scaled, form] = lambda batches=batches, count=count: (
                    count * BATCH / harness.seconds(lambda: [next(batches) for _ in range(count)])
                )
            found = harness.in_turns(works, args.rounds)
            for process in theirs.values():
                about = process.about["versions"]
                process.close()
            for form, scaled in ways:
                peer = {"tar": "webdataset", "folder": "torch"}[form]
                own, other = found[scaled, form], found[peer, form]
                name = f"{what}, {form}{', scaled' * scaled}"
                ratio = harness.ratios(own, other)
                met = harness.met(statistics.median(ratio), MIN_RATIO)
                middles = [f"{statistics.median(own):,.0f}", f"{peer} {statistics.median(other):,.0f}"]
                compared.append((name, *middles, harness.spread(ratio), met))
                *ours, pillow = parts(specs[form], size, tokenizer, count * BATCH, scaled_jpeg=scaled)
                whole = 1e3 / statistics.median(own)
                spent.append((name, *(f"{cell:.2f}" for cell in (*ours, whole - sum(ours), whole, pillow))))
    return [
        harness.machine(f"Pillow {Image.__version__}", about),
        *harness.command(args, photos="folder:PHOTOS", icons="wds:EMOJI/*.tar", peer_python="PEER/bin/python"),
        *harness.table("what | ours, images/s | theirs | ratio (lowest and highest round) | aim", compared),
        "",
        "Milliseconds of one picture on our side; rest: order, filters, padding, batching and memory that is cold.",
        "",
        *harness.table(f"what | {' | '.join(PARTS[:-1])} | rest | whole | {PARTS[-1]}", spent),
    ]


def resume(args, folder: Path) -> list[str]:
    """Seconds to index a million records once, to open them again, and to take the first batch after RESUME_AT."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    write_tar(folder / "tiny.tar", [Record(str(i), file.getvalue(), ("a small square",)) for i in range(10_100)])
    for i in range(SHARDS):  # one file under a hundred names: the index and the reads do not know
        os.link(folder / "tiny.tar", folder / f"many-{i:03d}.tar")
    spec = f"wds:{folder}/many-*.tar"
    index, again = (harness.seconds(lambda: open_source(spec)) for _ in range(2))
    tokenizer = BPETokenizer.train(["a small square"] * 10, vocab_size=300)
    batches = read(spec, 16, tokenizer)
    state = batches.get_state()
    state["position"]["next_index"] = RESUME_AT
    first = harness.seconds(lambda: (batches.set_state(state), next(batches)))
    met = "met" if again + first < MAX_RESUME_SECONDS else "not met"
    return [
        harness.machine(),
        *harness.command(args),
        f"{len(open_source(spec)):,} records: indexed once in {index:.1f} s, opened again in {again:.2f} s, resumed at "
        f"record {RESUME_AT:,} in {first:.2f} s up to the first batch (aim: under {MAX_RESUME_SECONDS:g} s together, "
        f"{met}).",
    ]


def stall(args, folder: Path) -> list[str]:
    """The share of a demo training in which the device waited for data."""
    from dalle_jax.train.monitor import goodput
    from dalle_jax.train.run import train
    from dalle_jax.train.settings import load_settings

    values = harness.transformer_inputs(folder, "configs/dvae.py:demo") | {"run.steps": STALL_STEPS}
    values |= dict.fromkeys(("run.validate_every", "run.picture_every", "run.checkpoint_every"))
    words = [f"--config.{key}={value}" for key, value in values.items()]
    train(load_settings("configs/transformer.py:demo", words), folder / "run", progress=False)
    seconds = goodput.read(folder / "run")["seconds"]
    share = seconds["data"] / (seconds["data"] + seconds["step"])
    met = "met" if share < MAX_STALL else "not met"
    return [
        harness.machine(),
        *harness.command(args),
        f"The demo's transformer, {STALL_STEPS} steps: waited {seconds['data']:.2f} s for data in "
        f"{seconds['step']:.1f} s of steps, {share:.2%} (aim: under {MAX_STALL:.0%}, {met}).",
    ]


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parts_of = {"rates": rates, "resume": resume, "stall": stall}
    parser.add_argument("part", choices=parts_of)
    parser.add_argument("--photos", help="source of JPEG photos with captions, e.g. folder:DIR")
    parser.add_argument("--icons", help="source of small PNG pictures with captions, e.g. wds:PATTERN")
    parser.add_argument("--peer-python", help="a Python with torch, webdataset and tokenizers")
    args = parser.parse_args()
    if args.part == "rates" and not (args.photos and args.icons and args.peer_python):
        parser.error("rates needs --photos, --icons and --peer-python")
    harness.two_cpus(2 if args.part == "stall" else 1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["DALLE_JAX_CACHE"] = f"{name}/cache"
        lines = parts_of[args.part](args, Path(name))
    harness.write(args.results / "input.md", "Speed of the input", lines, section=args.part.capitalize())


if __name__ == "__main__":
    main()
