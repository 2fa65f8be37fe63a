"""`dalle-jax data SOURCE`: the contents of a source, what training would drop and why, and ten examples on one sheet.

Every record is read, decoded and filtered as the pipeline does it, without cropping or training anything.
"""

import argparse
import collections
import dataclasses
import errno
import functools
import json
import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from dalle_jax import files
from dalle_jax.data import filters, transforms
from dalle_jax.data.decode import MAX_PIXELS_LIMIT, decode_image
from dalle_jax.data.in_order import evenly_spread, in_order
from dalle_jax.data.pipeline import MAX_THREADS, DataConfig
from dalle_jax.data.record import BadRecord, Dropped, Encoded, Record, Source
from dalle_jax.data.sources import HELP, check_outside, open_source
from dalle_jax.errors import UserError, check_number, say, writing_to
from dalle_jax.pictures.fonts import fonts_for
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.text import Tokenizer, load_tokenizer

DEFAULT_PICTURE = "examples.png"
EXAMPLES, COLUMNS = 10, 5  # records on the sheet, in a row of it
MAX_CAPTION = 75  # characters of a caption on the sheet
EXAMPLE_KEYS = 3  # named for each reason
FILTERS = dataclasses.fields(filters.Filters)
BLOCK = 32  # records for one thread at a time
RATIO_EDGES = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # width over height
SIDE_EDGES = (32, 64, 128, 256, 512, 1024, 2048)  # pixels of the shorter side


@dataclasses.dataclass(frozen=True)
class Usable:
    """A good record: its size in pixels, and the length of each caption that passes the filters."""

    width: int
    height: int
    lengths: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`; one option for every filter."""
    add = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add("source", help=HELP)
    add("--json", action="store_true", help="print one JSON object instead of text (default: no)")
    add("--tokenizer", metavar="DIR", help="count caption lengths in this tokenizer's tokens (default: in words)")
    add("--picture", metavar="PNG", help=f"draw {EXAMPLES} examples (default: {DEFAULT_PICTURE}, or none with --json)")
    add("--dropped", metavar="FILE", help="write one JSON per dropped record: key, reason, detail (default: no)")
    add("--limit", **number, help="look at N records, evenly spread (default: all)")
    add(
        "--pictures-only",
        action="store_true",
        help="captions are not needed, as for an image tokenizer (default: they are)",
    )
    add("--threads", **number, default=os.cpu_count() or 1, help="threads that decode (default: %(default)s)")
    add("--max-pixels", **number, default=DataConfig.max_pixels, help="drop larger images (default: %(default)s)")
    for field in FILTERS:
        option, words = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.default is False:
            add(option, action="store_true", help=f"{words} (default: no)")
        else:
            kind, shown = (float, "no limit") if field.default is None else (int, field.default)
            add(option, type=kind, default=field.default, metavar="X", help=f"{words} (default: {shown})")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 where some record is good, 2 where none is.

    Raises:
      UserError: a source, tokenizer, option or path that is wrong.
    """
    check_number("--limit", args.limit, min=1, whole=True, optional=True)
    check_number("--threads", args.threads, min=1, max=MAX_THREADS, whole=True)
    check_number("--max-pixels", args.max_pixels, min=1, max=MAX_PIXELS_LIMIT, whole=True)
    limits = {field.name: getattr(args, field.name) for field in FILTERS}
    config = DataConfig(max_pixels=args.max_pixels, **limits)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    source = open_source(args.source, captions_required=not args.pictures_only)
    for path in filter(None, (args.picture, args.dropped)):
        _check_place(path, args.source)
    picture = args.picture or (None if args.json else _default_picture(args.source))
    rows = evenly_spread(len(source), args.limit)
    found = survey(source, rows, config=config, tokenizer=tokenizer, threads=args.threads)
    summary = summarize(source.name, found, unit="tokens" if tokenizer else "words", total=len(source))
    if args.dropped:
        lines = [json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in found if isinstance(outcome, Dropped)]
        with writing_to(args.dropped, "file"):
            files.write(args.dropped, "".join(lines))
    good = [row for row, outcome in zip(rows, found, strict=True) if isinstance(outcome, Usable)]
    if picture and good:
        summary["picture"] = str(picture)
    print(json.dumps(summary) if args.json else as_text(summary), flush=True)
    if picture and good:
        chosen = (source[good[i]] for i in evenly_spread(len(good), EXAMPLES))
        draw([record for record in chosen if isinstance(record, Record)], picture, config=config)
    if not good:
        say(f"dalle-jax: no record of {source.name} can be used")
    return 0 if good else 2


def _check_place(path: str, spec: str) -> None:
    """Raise UserError unless a file can be written to `path`, outside of the source."""
    check_outside(spec, path)
    with writing_to(path, "file"):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        files.probe(pathlib.Path(path).parent)


def _default_picture(spec: str) -> str | None:
    try:
        _check_place(DEFAULT_PICTURE, spec)
    except UserError as error:
        say(f"dalle-jax: no examples are drawn without --picture: {error}")
        return None
    return DEFAULT_PICTURE


def survey(
    source: Source, rows: Sequence[int], *, config: DataConfig, tokenizer: Tokenizer | None, threads: int
) -> list[Usable | Dropped]:
    """The outcome of each row, in order; decoded by so many threads, with a bar on stderr."""
    check = functools.partial(check_record, config=config, tokenizer=tokenizer)

    def check_block(block: Sequence[int]) -> list[Usable | Dropped]:
        return [check(source[row]) for row in block]

    found: list[Usable | Dropped] = []
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    with tqdm.tqdm(total=len(rows), unit=" records", disable=None, file=sys.stderr) as bar:
        for outcomes in in_order(check_block, blocks, threads=threads, ahead=2 * threads):
            found += outcomes
            bar.update(len(outcomes))
    return found


def check_record(
    record: Record | Encoded | Dropped, *, config: DataConfig, tokenizer: Tokenizer | None
) -> Usable | Dropped:
    """The outcome of one record in training."""
    if isinstance(record, Dropped):
        return record
    assert isinstance(record, Record)  # `open_source` refuses image tokens here
    try:
        height, width = decode_image(record.image, max_pixels=config.max_pixels).shape[:2]
        captions = filters.good_captions(record.captions, width, height, config)
    except BadRecord as bad:
        return Dropped(record.key, bad.reason, bad.detail)
    split = tokenizer.encode if tokenizer else str.split
    return Usable(width, height, tuple(len(split(caption)) for caption in captions))


def summarize(name: str, found: list[Usable | Dropped], *, unit: str, total: int) -> dict:
    """The report as plain json; `records` = `good` + all of `dropped`."""
    good = [outcome for outcome in found if isinstance(outcome, Usable)]
    bad = [outcome for outcome in found if isinstance(outcome, Dropped)]
    examples: dict[str, list[dict[str, str]]] = {}
    for dropped in bad:
        named = examples.setdefault(dropped.reason, [])
        if len(named) < EXAMPLE_KEYS:
            named.append({"key": dropped.key, "detail": dropped.detail})
    width, height = np.array([(outcome.width, outcome.height) for outcome in good]).reshape(-1, 2).T
    lengths = np.array([length for outcome in good for length in outcome.lengths])
    return {
        "source": name,
        "source_records": total,
        "records": len(found),
        "good": len(good),
        "dropped": dict(collections.Counter(dropped.reason for dropped in bad).most_common()),
        "dropped_examples": examples,
        "width": _statistics(width),
        "height": _statistics(height),
        "shorter_side": _histogram(np.minimum(width, height), SIDE_EDGES),
        "aspect_ratio": _histogram(width / height, RATIO_EDGES),
        "captions": len(lengths),
        "caption_length_unit": unit,
        "caption_length": _statistics(lengths),
        "picture": None,
    }


def _statistics(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, high, top = np.percentile(values, (0, 50, 95, 100))
    return {"min": low, "median": median, "mean": float(values.mean()), "p95": high, "max": top}


def _histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """Label -> count; a bin includes its lower edge."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    between = [f"{low:g} - {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    labels = [f"< {edges[0]:g}", *between, f">= {edges[-1]:g}"]
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}


def as_text(summary: dict) -> str:
    """The report for people."""
    records, good = summary["records"], summary["good"]
    part = "" if records == summary["source_records"] else f" (of {summary['source_records']})"
    lines = [summary["source"], f"  records  {records}{part}", f"  good     {good}", f"  dropped  {records - good}"]
    for reason, count in summary["dropped"].items():
        lines.append(f"    {count:8d}  {reason}")
        for example in summary["dropped_examples"][reason]:
            detail = f": {example['detail']}" if example["detail"] else ""
            line = textwrap.shorten(_printable(f"{example['key']}{detail}"), 110, placeholder=" ...")
            lines.append(" " * 14 + line)
    if not good:
        return "\n".join(lines)
    for name in ("width", "height"):
        lines.append(f"  {name:<8} {_in_words(summary[name])} pixels")
    for name, title in (("shorter_side", "shorter side in pixels"), ("aspect_ratio", "width / height")):
        lines += [f"  {title}", *_bars(summary[name])]
    if summary["captions"]:
        lines.append(
            f"  captions {summary['captions']}, {summary['captions'] / good:.2f} a record, "
            f"{_in_words(summary['caption_length'])} {summary['caption_length_unit']}"
        )
    if summary["picture"]:
        lines.append(f"  examples {summary['picture']}")
    return "\n".join(lines)


def _in_words(statistics: dict[str, float]) -> str:
    return "{min:.0f} .. {max:.0f}, median {median:.0f}, 95 % up to {p95:.0f}".format(**statistics)


def _bars(histogram: dict[str, int]) -> list[str]:
    longest = max(histogram.values())
    return [f"    {label:>11}  {n:8d}  {'#' * round(40 * n / longest)}".rstrip() for label, n in histogram.items()]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def draw(records: list[Record], path: str, *, config: DataConfig) -> None:
    """One PNG with these records, cropped to the center as in validation, each above its first caption.

    Raises:
      UserError: the file cannot be written.
    """
    images = [decode_image(record.image, max_pixels=config.max_pixels) for record in records]
    crops = [transforms.center_crop(image, config.image_size) for image in images]
    captions = [_printable(record.captions[0])[:MAX_CAPTION] if record.captions else "" for record in records]
    with writing_to(path, "file"), files.replacing(path) as aside:
        contact_sheet(crops, captions, columns=COLUMNS).save(aside, "PNG")
    if undrawable := fonts_for(captions)[1]:
        say(
            f"dalle-jax: no installed font has {len(undrawable)} of the letters in {path}, such as "
            f"{min(undrawable)!r}: they are drawn as boxes (install a font of their script)"
        )
