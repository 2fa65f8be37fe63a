"""`dalle-jax encode`: the pictures of a source become a dVAE's codes once, instead of in every update of a transformer.

Each picture is cropped K times as training would crop it, by a generator of its own, and each crop becomes the most
likely codes (section 2.2). Shards are written whole or not at all and never twice, so the command can be killed and
given again, and several machines can share the work by `--part`. The format is `data/tokens.py`.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from concurrent import futures

import jax
import numpy as np
import tqdm

from dalle_jax import config as configs
from dalle_jax import files, model_dir, sharding
from dalle_jax.data import transforms
from dalle_jax.data.decode import MAX_PIXELS, BadImage, decode_image
from dalle_jax.data.record import Dropped, Encoded, Source
from dalle_jax.data.sources import HELP, TOKENS, features, open_source
from dalle_jax.errors import UserError
from dalle_jax.mesh import local_mesh
from dalle_jax.models import Model, Params
from dalle_jax.models.dvae import encode_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`."""
    parser.add_argument("source", help=HELP)
    parser.add_argument("--dvae", required=True, metavar="DIR", help="workdir or exported model of the dVAE")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--augmentations", type=int, default=1, metavar="K", help="crops of each picture (default 1)")
    parser.add_argument(
        "--augment",
        choices=tuple(transforms.AUGMENTATIONS),
        default="transformer",
        help="how to crop, as config.data.augment (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default 0)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are dropped (%(default)s)")
    parser.add_argument(
        "--shard-records", type=int, default=4096, metavar="N", help="pictures of a shard (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="crops encoded at once (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that decode (default %(default)s)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="do every N-th shard only, from the I-th, from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def main(args: argparse.Namespace) -> int:
    """Encodes what is not encoded yet and prints one line; 0, or 2 where no record of the finished shards is usable.

    Raises:
      UserError: a source, dVAE or option that is wrong, or a folder that cannot be written or holds other codes.
    """
    for name in ("batch_size", "threads", "max_pixels"):
        if getattr(args, name) < 1:
            raise UserError(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(args, name)}: raise it")
    if args.augment == "center" and args.augmentations > 1:
        raise UserError(
            f"expected --augmentations 1 with --augment center, got {args.augmentations}: center crops are all the same"
        )
    part = _part(args.part)
    dvae = model_dir.load(args.dvae, name="dvae")
    sizes = dvae.model.config
    source = open_source(args.source)
    try:
        settings = features.Settings(
            dvae_sha256=dvae.digest,
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
    except ValueError as error:
        raise UserError(f"expected possible settings, got some where {error}: change them") from error
    encoder = Encoder(dvae.model, dvae.params, settings, batch_size=args.batch_size, max_pixels=args.max_pixels)
    summary = encode(source, args.out, settings, encoder, part=part, threads=args.threads)
    print(json.dumps(summary) if args.json else _line(args.out, summary))
    return 0 if summary["good"] or not summary["dropped"] else 2


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise UserError(f"expected --part I/N with I from 0 to N - 1, got {text!r}: e.g. 0/4, 1/4, 2/4 and 3/4")
    return int(number), int(parts)


class Encoder:
    """Records to codes on all devices of this process, `batch_size` crops at a time."""

    def __init__(self, model: Model, params: Params, settings: features.Settings, *, batch_size: int, max_pixels: int):
        self._settings, self._max_pixels = settings, max_pixels
        self._mesh = local_mesh()
        self._params = jax.device_put(params, sharding.replicated(self._mesh))
        self.block = max(1, batch_size // settings.augmentations)  # records at a time
        ways = sharding.batch_ways(self._mesh)
        self._crops = -(-self.block * settings.augmentations // ways) * ways  # of a batch, padding included

        def codes(params, image_uint8):
            with sharding.use(self._mesh):
                return encode_images(model, params, image_uint8)

        self._codes = jax.jit(codes)

    def crop(self, source: Source, index: int) -> tuple[Dropped | Encoded, np.ndarray | None]:
        """What is known of a record before its codes are, and its crops uint8 [K, S, S, 3]."""
        record, own = source[index], self._settings
        if isinstance(record, Dropped):
            return record, None
        try:
            image = decode_image(record.image, max_pixels=self._max_pixels)
        except BadImage as bad:
            return Dropped(record.key, bad.reason, bad.detail), None
        augment = transforms.AUGMENTATIONS[own.augment]
        rngs = [np.random.default_rng((own.seed, index, crop)) for crop in range(own.augmentations)]
        crops = np.stack([augment(image, own.image_size, rng) for rng in rngs])
        return Encoded(record.key, np.empty(0, np.uint16), *image.shape[:2], record.captions), crops

    def start(self, crops: list[np.ndarray]) -> jax.Array | None:
        """Sends the crops of one block of records to the devices; their codes will be in what is returned."""
        if not crops:
            return None
        batch = np.concatenate(crops)
        batch = np.pad(batch, [(0, self._crops - len(batch)), (0, 0), (0, 0), (0, 0)])
        return self._codes(self._params, sharding.shard_batch({"image": batch}, self._mesh)["image"])

    def finish(self, known: list[Dropped | Encoded], codes: jax.Array | None) -> list[Dropped | Encoded]:
        """The block's slots, codes filled in; waits for the devices."""
        if codes is None:
            return known
        shape = -1, self._settings.augmentations, self._settings.grid**2
        many = len([slot for slot in known if isinstance(slot, Encoded)]) * self._settings.augmentations
        codes_RKI = iter(np.asarray(codes)[:many].astype(np.uint16).reshape(shape))
        return [dataclasses.replace(s, tokens_KI=next(codes_RKI)) if isinstance(s, Encoded) else s for s in known]


def encode(
    source: Source,
    folder: pathlib.Path,
    settings: features.Settings,
    encoder: Encoder,
    *,
    part: tuple[int, int] = (0, 1),
    threads: int = 1,
) -> dict:
    """Write the shards of this part that are not there yet; its progress on stderr.

    part: number of this part, and of parts. Returns: what `--json` prints, counted over the finished shards of the
    part, those of earlier calls included; `now` is what this call did.

    Raises:
      UserError: a folder that cannot be written or holds other codes.
    """
    began, now = time.monotonic(), 0
    number, parts = part
    try:
        _claim(folder, settings)
        own = range(number, settings.shards, parts)
        done = features.finished(folder, settings)
        before = sum(len(settings.slots(shard)) for shard in own if shard in done)
        total = sum(len(settings.slots(shard)) for shard in own)
        with (
            futures.ThreadPoolExecutor(threads) as pool,
            tqdm.tqdm(total=total, initial=before, unit=" records", disable=None, file=sys.stderr) as bar,
        ):
            for shard in own:
                if shard in done:
                    continue
                slots = _encode_shard(source, settings.slots(shard), encoder, pool=pool, bar=bar)
                for left_by_a_kill in folder.glob(f".{features.shard_name(shard)}.*"):
                    left_by_a_kill.unlink()
                files.write(folder / features.shard_name(shard), features.pack(slots, settings))
                now += len(slots)
    except OSError as error:
        raise UserError(
            f"expected a folder to write to, got {folder} ({error.strerror}): make room or choose another, and give "
            "the command again, which goes on"
        ) from error
    counted = [features.count(folder / features.shard_name(shard)) for shard in own]
    dropped = sum((reasons for _, reasons in counted), collections.Counter())
    seconds = time.monotonic() - began
    return {
        "records": total,
        "good": sum(good for good, _ in counted),
        "dropped": dict(dropped.most_common()),
        "shards": len(own),
        "shards_left_to_others": settings.shards - len(features.finished(folder, settings)),
        "now": {"records": now, "seconds": seconds, "records_per_second": now / seconds},
        "bytes": sum((folder / features.shard_name(shard)).stat().st_size for shard in own),
        "settings": dataclasses.asdict(settings),
    }


def _claim(folder: pathlib.Path, settings: features.Settings) -> None:
    """Write the settings into a new folder; refuse one that has others."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / features.SETTINGS).exists():
        there = dataclasses.asdict(features.read_settings(folder))
        if changed := configs.differences(there, dataclasses.asdict(settings)):
            listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in sorted(changed.items()))
            raise UserError(f"{folder} holds other codes ({listed}): use these values again or another --out")
        return
    text = json.dumps(dataclasses.asdict(settings), indent=1) + "\n"
    files.write(folder / features.SETTINGS, text)


def _encode_shard(source: Source, rows: range, encoder: Encoder, *, pool, bar) -> list[Dropped | Encoded]:
    """The slots of one shard. Threads crop the next block while the devices encode the one before."""
    crop = functools.partial(encoder.crop, source)
    blocks = [rows[start : start + encoder.block] for start in range(0, len(rows), encoder.block)]
    slots, waiting = [], None
    ahead = [pool.submit(crop, row) for row in blocks[0]]
    for following in [*blocks[1:], range(0)]:
        this, ahead = ahead, [pool.submit(crop, row) for row in following]
        known, crops = zip(*(future.result() for future in this), strict=True)
        started = list(known), encoder.start([found for found in crops if found is not None])
        if waiting is not None:
            slots += encoder.finish(*waiting)
        waiting = started
        bar.update(len(known))
    return slots + encoder.finish(*waiting)


def _line(folder: pathlib.Path, summary: dict) -> str:
    settings, dropped, now = summary["settings"], summary["dropped"], summary["now"]
    reasons = f" ({', '.join(f'{count} {reason}' for reason, count in dropped.items())})" if dropped else ""
    left = summary["shards_left_to_others"]
    ready = f"train with --config.data.train={TOKENS}:{folder} --config.data.augment={settings['augment']}"
    return (
        f"{folder}: {summary['good']} of {summary['records']} pictures as {settings['augmentations']} x "
        f"{settings['grid'] ** 2} codes, {sum(dropped.values())} dropped{reasons}, {summary['shards']} shards of "
        f"{summary['bytes'] / 1e6:.1f} MB; {now['records']} pictures now, {now['records_per_second']:.1f}/s; "
        + (f"{left} shards are left to other parts" if left else ready)
    )
