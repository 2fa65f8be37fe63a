"""`dalle-jax data SOURCE`: what a source holds, what training would drop and why, and ten examples as one picture.

Every record is read, decoded and filtered exactly as the pipeline does it, without cropping or training anything.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
import textwrap
import warnings
from concurrent import futures

import numpy as np
import tqdm

from dalle_jax.data import filters, transforms
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.data.record import Dropped, Record, Source
from dalle_jax.data.sources import HELP, open_source
from dalle_jax.errors import UserError
from dalle_jax.pictures.fonts import fonts_for
from dalle_jax.text import Tokenizer, load_tokenizer

EXAMPLES = 10  # records in the picture
EXAMPLE_KEYS = 3  # named for each reason
BLOCK = 32  # records for one thread at a time
RATIO_EDGES = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # width over height
SIDE_EDGES = (32, 64, 128, 256, 512, 1024, 2048)  # pixels of the shorter side


@dataclasses.dataclass(frozen=True)
class Seen:
    """A good record: its size in pixels, and the length of each caption that passes the filters."""

    width: int
    height: int
    lengths: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`; one option for every filter."""
    parser.add_argument("source", help=HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="count caption lengths in this tokenizer's tokens, not words"
    )
    parser.add_argument(
        "--picture", metavar="PNG", help=f"draw {EXAMPLES} examples (default: examples.png; none with --json)"
    )
    parser.add_argument(
        "--dropped", metavar="FILE", help="write every dropped record's key and reason, one JSON a line"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="look at N records, evenly spread")
    parser.add_argument("--pictures-only", action="store_true", help="captions are not needed, as for a dVAE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--max-pixels", type=int, default=DataConfig.max_pixels, help="default: %(default)s")
    for field in dataclasses.fields(filters.Filters):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(option, action="store_true", help="filter, off by default")
        else:
            parser.add_argument(option, type=field.type, default=field.default, help="filter, default: %(default)s")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 where some record is good, 2 where none is.

    Raises:
      UserError: a source, tokenizer, option or picture path that is wrong.
    """
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(filters.Filters)}
    try:
        config = DataConfig(max_pixels=args.max_pixels, threads=args.threads, **chosen)
    except ValueError as error:
        raise UserError(f"expected sensible limits, got an impossible one: {error}") from error
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    picture = args.picture or (None if args.json else "examples.png")
    for option, path in (("picture", picture), ("dropped", args.dropped)):
        if path and not os.access(pathlib.Path(path).resolve().parent, os.W_OK):
            raise UserError(f"expected a writable place for --{option}, got {path}: choose another")
    source = open_source(args.source, captions_required=not args.pictures_only)
    return report(
        source,
        config=config,
        as_json=args.json,
        tokenizer=tokenizer,
        picture=picture,
        dropped=args.dropped,
        limit=args.limit,
    )


def report(
    source: Source,
    *,
    config: DataConfig,
    as_json: bool,
    tokenizer: Tokenizer | None = None,
    picture: str | None = None,
    dropped: str | None = None,
    limit: int = 0,
) -> int:
    """Prints the report of `source` on stdout, its progress on stderr; returns the exit status.

    Args:
      config: its filters, max_pixels and threads are used.
      picture: where to draw the examples; None for no picture.
      dropped: where to list all that was dropped, one JSON {"key", "reason", "detail"} a line; None for no list.
      limit: at most so many records, evenly spread; 0 for all.

    Raises:
      UserError: the picture or the list cannot be written.
    """
    rows = range(len(source))
    if 0 < limit < len(source):
        rows = [int(row) for row in np.linspace(0, len(source) - 1, limit)]
    seen = survey(source, rows, config=config, tokenizer=tokenizer)
    summary = summarise(source.name, seen, unit="tokens" if tokenizer else "words", total=len(source))
    if dropped:
        write_dropped([outcome for outcome in seen if isinstance(outcome, Dropped)], dropped)
    good = [row for row, outcome in zip(rows, seen, strict=True) if isinstance(outcome, Seen)]
    if picture and good:
        chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(EXAMPLES, len(good))).astype(int)]
        undrawable = draw([source[row] for row in chosen], picture, config=config)
        summary["picture"] = str(picture)
        if undrawable:
            print(
                f"dalle-jax: no installed font has {len(undrawable)} of the letters in {picture}, such as "
                f"{min(undrawable)!r}: they are drawn as boxes (install a font of their script)",
                file=sys.stderr,
            )
    print(json.dumps(summary) if as_json else as_text(summary))
    if not good:
        print(f"dalle-jax: no record of {source.name} can be used", file=sys.stderr)
    return 0 if good else 2


def survey(source: Source, rows, *, config: DataConfig, tokenizer: Tokenizer | None) -> list[Seen | Dropped]:
    """What becomes of each row, in order; decoded by `config.threads` threads."""

    def look_at(block) -> list[Seen | Dropped]:
        return [look(source[row], config=config, tokenizer=tokenizer) for row in block]

    seen: list[Seen | Dropped] = []
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    with (
        futures.ThreadPoolExecutor(max(1, config.threads)) as pool,
        tqdm.tqdm(total=len(rows), unit=" records", disable=None, file=sys.stderr) as bar,
    ):
        for outcomes in pool.map(look_at, blocks):
            seen += outcomes
            bar.update(len(outcomes))
    return seen


def look(record: Record | Dropped, *, config: DataConfig, tokenizer: Tokenizer | None) -> Seen | Dropped:
    """What training would make of one record."""
    if isinstance(record, Dropped):
        return record
    try:
        height, width = decode_image(record.image, max_pixels=config.max_pixels).shape[:2]
    except BadImage as bad:
        return Dropped(record.key, bad.reason, bad.detail)
    if reason := filters.check(record.captions, width, height, config):
        return Dropped(record.key, reason, f"{width}x{height} pixels; {' | '.join(record.captions)[:80]}")
    split = tokenizer.encode if tokenizer else str.split
    return Seen(width, height, tuple(len(split(caption)) for caption in filters.good_captions(record.captions, config)))


def summarise(name: str, seen: list[Seen | Dropped], *, unit: str, total: int) -> dict:
    """The report as plain json; `records` = `good` + all of `dropped`."""
    good = [outcome for outcome in seen if isinstance(outcome, Seen)]
    bad = [outcome for outcome in seen if isinstance(outcome, Dropped)]
    examples: dict[str, list[dict[str, str]]] = {}
    for dropped in bad:
        named = examples.setdefault(dropped.reason, [])
        if len(named) < EXAMPLE_KEYS:
            named.append({"key": dropped.key, "detail": dropped.detail})
    sizes_GK = np.array([(outcome.width, outcome.height) for outcome in good]).reshape(-1, 2)
    lengths = np.array([length for outcome in good for length in outcome.lengths])
    return {
        "source": name,
        "source_records": total,
        "records": len(seen),
        "good": len(good),
        "dropped": dict(collections.Counter(dropped.reason for dropped in bad).most_common()),
        "dropped_examples": examples,
        "width": _statistics(sizes_GK[:, 0]),
        "height": _statistics(sizes_GK[:, 1]),
        "shorter_side": _histogram(sizes_GK.min(1), SIDE_EDGES),
        "aspect_ratio": _histogram(sizes_GK[:, 0] / sizes_GK[:, 1], RATIO_EDGES),
        "captions": len(lengths),
        "caption_length_unit": unit,
        "caption_length": _statistics(lengths),
        "picture": None,
    }


def write_dropped(records: list[Dropped], path: str) -> None:
    """One JSON a line for each of these records.

    Raises:
      UserError: the file cannot be written.
    """
    lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in records]
    try:
        pathlib.Path(path).write_text("".join(lines))
    except OSError as error:
        raise UserError(f"expected a file to write to, got {path} ({error.strerror}): choose another") from error


def _statistics(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, high, top = np.percentile(values, (0, 50, 95, 100))
    return {"min": low, "median": median, "mean": float(values.mean()), "p95": high, "max": top}


def _histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """Label -> count; a bin includes its lower edge."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    labels = [
        f"< {edges[0]:g}",
        *(f"{a:g} - {b:g}" for a, b in zip(edges, edges[1:], strict=False)),
        f">= {edges[-1]:g}",
    ]
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
            lines.append(textwrap.shorten(f"{_printable(example['key'])}{_printable(detail)}", 110, placeholder=" ..."))
            lines[-1] = " " * 14 + lines[-1]
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
    most = max(histogram.values())
    return [
        f"    {label:>11}  {count:8d}  {'#' * round(40 * count / most)}".rstrip() for label, count in histogram.items()
    ]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def draw(records: list[Record], path: str, *, config: DataConfig) -> set[str]:
    """One PNG with these records, cropped to the center as validation sees them, each under its first caption.

    Returns:
      The letters that no installed font has, drawn as boxes.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # a second to import, and --json rarely needs it

    columns = min(5, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(2.4 * columns, 3.0 * rows), layout="constrained")
    captions = [textwrap.fill(_printable(record.captions[0])[:75], 26) if record.captions else "" for record in records]
    fonts, undrawable = fonts_for(captions)
    for place, (record, caption) in enumerate(zip(records, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = decode_image(record.image, max_pixels=config.max_pixels)
        axes.imshow(transforms.center_crop(image, config.image_size))
        axes.set_title(caption, fontsize=8, family=list(fonts), parse_math=False, wrap=True)
        axes.set_axis_off()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # of what is returned as undrawable
            figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"expected to write the picture {path}, got {error}: choose another with --picture") from error
    return undrawable
