"""`dalle-jax encode`: the images of a source become image tokens once, instead of in every step of a transformer.

Each image is cropped A times as training would crop it, by generators of its own, and each crop becomes its most likely
image tokens (section 2.2). Shards are written whole or not at all and never twice, so the command can be killed and
given again, and several machines can share the work by `--part`. The format is `data/sources/features.py`.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

from dalle_jax import files, model_dir, sharding, signals
from dalle_jax.data import transforms
from dalle_jax.data.decode import MAX_PIXELS, MAX_PIXELS_LIMIT, BadImage, decode_image
from dalle_jax.data.in_order import in_order
from dalle_jax.data.pipeline import MAX_THREADS
from dalle_jax.data.record import Dropped, Encoded, Record, Source
from dalle_jax.data.share import Share
from dalle_jax.data.sources import HELP, TOKENS, features, open_source
from dalle_jax.errors import UserError, check_number
from dalle_jax.mesh import local_mesh
from dalle_jax.models import image_tokenizer

MAX_BATCH, MAX_SHARD = 1 << 16, 1 << 20  # crops of a batch, images of a shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`."""

    def add(flag: str, words: str, **options) -> None:
        parser.add_argument(flag, help=words + (" (default: %(default)s)" if "default" in options else ""), **options)

    add("source", HELP)
    parser.add_argument(
        "--image-tokenizer",
        "--dvae",
        required=True,
        metavar="DIR",
        help="workdir or exported model of an image tokenizer (required)",
    )
    add("--out", "folder for the shards", required=True, type=pathlib.Path, metavar="DIR")
    add("--augmentations", "crops of each image", type=int, default=1, metavar="N")
    add("--augment", "how to crop", choices=tuple(transforms.AUGMENTATIONS), default="transformer")
    add("--seed", "seed of the crops", type=int, default=0, metavar="N")
    add("--max-pixels", "drop larger images", type=int, default=MAX_PIXELS, metavar="N")
    add("--shard-records", "images of a shard", type=int, default=4096, metavar="N")
    add("--batch-size", "crops encoded at once", type=int, default=64, metavar="N")
    add("--threads", "threads that decode", type=int, default=os.cpu_count() or 1, metavar="N")
    add("--part", "make every N-th shard, beginning with shard I, counted from 0", default="0/1", metavar="I/N")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line (default: no)")


def main(args: argparse.Namespace) -> int:
    """Encodes what is not encoded yet and prints one line; 0, or 2 if no record of the finished shards is usable.

    Raises:
      UserError: a source, image tokenizer or option that is wrong, or a folder that cannot be written or holds other
        tokens.
    """
    check_number("--batch-size", args.batch_size, min=1, max=MAX_BATCH, whole=True)
    check_number("--shard-records", args.shard_records, min=1, max=MAX_SHARD, whole=True)
    check_number("--threads", args.threads, min=1, max=MAX_THREADS, whole=True)
    check_number("--max-pixels", args.max_pixels, min=1, max=MAX_PIXELS_LIMIT, whole=True)
    check_number("--augmentations", args.augmentations, min=1, max=MAX_BATCH, whole=True)
    check_number("--seed", args.seed, min=0, max=2**63 - 1, whole=True)
    if args.augment == "center" and args.augmentations > 1:
        raise UserError(
            f"expected --augmentations 1 with --augment center, got {args.augmentations}: center crops are all the same"
        )
    share = Share.of_option(args.part)
    tokenizer = model_dir.load(args.image_tokenizer, name=image_tokenizer.NAMES)
    sizes = tokenizer.model.config
    if sizes.vocab > features.MAX_VOCAB:
        raise UserError(
            f"expected an image tokenizer of at most {features.MAX_VOCAB:,} different tokens, which 16 bits can name, "
            f"got one of {sizes.vocab:,} in {args.image_tokenizer}: train on images instead"
        )
    source = open_source(args.source)
    settings = features.Settings(
        dvae_sha256=tokenizer.digest,
        image_size=sizes.image_size,
        grid=sizes.grid,
        vocab=sizes.vocab,
        augment=args.augment,
        augmentations=args.augmentations,
        seed=args.seed,
        source=args.source,
        records=len(source),
        shard_records=args.shard_records,
    )
    encoder = Encoder(tokenizer, settings, batch_size=args.batch_size, max_pixels=args.max_pixels)
    summary = encode(source, args.out, settings, encoder, share=share, threads=args.threads)
    print(json.dumps(summary) if args.json else _line(args.out, summary))
    return 0 if summary["good"] or not summary["dropped"] else 2


class Encoder:
    """Records to image tokens on all devices of this process, about `batch_size` crops at a time.

    Attributes:
      block: records at a time.
    """

    def __init__(self, tokenizer: model_dir.ModelDir, settings: features.Settings, *, batch_size: int, max_pixels: int):
        self._settings, self._max_pixels = settings, max_pixels
        self._mesh = local_mesh()
        self._params = jax.device_put(tokenizer.params, sharding.replicated(self._mesh))
        self.block = max(1, batch_size // settings.augmentations)
        ways = sharding.batch_ways(self._mesh)
        self._crops = -(-self.block * settings.augmentations // ways) * ways  # of a batch, padding included

        def tokens(params, image_uint8):
            with sharding.use(self._mesh):
                return image_tokenizer.encode(tokenizer.model, params, image_uint8)

        self._tokens = jax.jit(tokens)

    def crop(self, source: Source, index: int) -> tuple[Dropped | Encoded, np.ndarray | None]:
        """A record without its tokens, and its crops uint8 [A, H, W, 3]."""
        record, settings = source[index], self._settings
        if isinstance(record, Dropped):
            return record, None
        assert isinstance(record, Record)  # `open_source` refuses image tokens here
        try:
            image = decode_image(record.image, max_pixels=self._max_pixels)
        except BadImage as bad:
            return Dropped(record.key, bad.reason, bad.detail), None
        augment = transforms.AUGMENTATIONS[settings.augment]
        rngs = [np.random.default_rng((settings.seed, index, crop)) for crop in range(settings.augmentations)]
        crops = np.stack([augment(image, settings.image_size, rng) for rng in rngs])
        height, width = image.shape[:2]
        return Encoded(record.key, np.empty(0, np.uint16), height, width, record.captions), crops

    def start(self, crops: list[np.ndarray]) -> jax.Array | None:
        """Send the crops of a block of records to the devices, which then fill the array that is returned."""
        if not crops:
            return None
        batch = sharding.fill_rows(np.concatenate(crops), self._crops)
        return self._tokens(self._params, sharding.shard_batch({"image": batch}, self._mesh)["image"])

    def finish(self, slots: list[Dropped | Encoded], tokens: jax.Array | None) -> list[Dropped | Encoded]:
        """The slots of the block with their tokens; waits for the devices."""
        if tokens is None:
            return slots
        augmentations = self._settings.augmentations
        count = augmentations * sum(isinstance(slot, Encoded) for slot in slots)
        tokens_XAI = np.asarray(tokens)[:count].astype(np.uint16).reshape(-1, augmentations, self._settings.grid**2)
        rest = iter(tokens_XAI)
        return [dataclasses.replace(s, tokens_AI=next(rest)) if isinstance(s, Encoded) else s for s in slots]


def encode(
    source: Source,
    folder: pathlib.Path,
    settings: features.Settings,
    encoder: Encoder,
    *,
    share: Share,
    threads: int,
) -> dict:
    """Write the shards of this share that are not there yet, with a bar on stderr.

    Returns: what `--json` prints, counted over the finished shards of the share, those of earlier calls included; `now`
    is what this call did.

    Raises:
      UserError: a folder that cannot be written or holds other tokens.
    """
    began, now, shards = time.monotonic(), 0, range(settings.shards)[share.slice]
    try:
        _claim(folder, settings)
        done = features.finished(folder, settings)
        total = sum(len(settings.slots(shard)) for shard in shards)
        left = sum(len(settings.slots(shard)) for shard in shards if shard not in done)
        files.probe(folder)
        kept = f"the shards that are finished stay in {folder}: the same command goes on with the others"
        with (
            signals.keeping(kept),
            tqdm.tqdm(total=total, initial=total - left, unit=" records", disable=None, file=sys.stderr) as bar,
        ):
            for shard in shards:
                if shard in done:
                    continue
                slots = _encode_shard(source, settings.slots(shard), encoder, threads=threads, bar=bar)
                for left_by_a_kill in folder.glob(f".{features.shard_name(shard)}.*"):
                    left_by_a_kill.unlink()
                files.write(folder / features.shard_name(shard), features.pack(slots, settings))
                now += len(slots)
    except OSError as error:
        raise UserError(
            f"expected a folder to write to, got {folder} ({error.strerror}): make room or choose another, and give "
            "the command again, which resumes"
        ) from error
    paths = [folder / features.shard_name(shard) for shard in shards]
    counts = [features.count(path) for path in paths]
    dropped = sum((reasons for _, reasons in counts), collections.Counter())
    seconds = time.monotonic() - began
    return {
        "records": total,
        "good": sum(good for good, _ in counts),
        "dropped": dict(dropped.most_common()),
        "shards": len(shards),
        "shards_left_to_others": settings.shards - len(features.finished(folder, settings)),
        "now": {"records": now, "seconds": seconds, "records_per_second": now / seconds},
        "bytes": sum(path.stat().st_size for path in paths),
        "settings": dataclasses.asdict(settings),
    }


def _claim(folder: pathlib.Path, settings: features.Settings) -> None:
    """Write the settings into a new folder; refuse one that has others."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = dataclasses.asdict(settings)
    if not (folder / features.SETTINGS).exists():
        files.write(folder / features.SETTINGS, json.dumps(wanted, indent=1) + "\n")
        return
    found = dataclasses.asdict(features.read_settings(folder))
    changed = [f"{key} was {found[key]!r} and is {wanted[key]!r}" for key in sorted(found) if found[key] != wanted[key]]
    if changed:
        raise UserError(f"{folder} holds other tokens ({', '.join(changed)}): use these values again or another --out")


def _encode_shard(source: Source, rows: range, encoder: Encoder, *, threads: int, bar) -> list[Dropped | Encoded]:
    """The slots of one shard. Threads crop the next block while the devices encode the one before."""
    cropped = in_order(functools.partial(encoder.crop, source), rows, threads=threads, ahead=2 * encoder.block)
    finished: list[Dropped | Encoded] = []
    running: tuple[list[Dropped | Encoded], jax.Array | None] = [], None
    while block := list(itertools.islice(cropped, encoder.block)):
        slots, crops = zip(*block, strict=True)
        started = list(slots), encoder.start([crop for crop in crops if crop is not None])
        finished += encoder.finish(*running)
        running = started
        bar.update(len(slots))
    return finished + encoder.finish(*running)


def _line(folder: pathlib.Path, summary: dict) -> str:
    settings, dropped, now = summary["settings"], summary["dropped"], summary["now"]
    reasons = f" ({', '.join(f'{count} {reason}' for reason, count in dropped.items())})" if dropped else ""
    left = summary["shards_left_to_others"]
    ready = f"train with --config.run.data.train={TOKENS}:{folder} --config.data.augment={settings['augment']}"
    return (
        f"{folder}: {summary['good']} of {summary['records']} pictures as {settings['augmentations']} x "
        f"{settings['grid'] ** 2} image tokens, {sum(dropped.values())} dropped{reasons}, {summary['shards']} shards "
        f"of {summary['bytes'] / 1e6:.1f} MB; {now['records']} pictures now, {now['records_per_second']:.1f}/s; "
        + (f"{left} shards are left to other parts" if left else ready)
    )
