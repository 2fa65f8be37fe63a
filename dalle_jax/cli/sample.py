"""`dalle-jax sample`: images for captions, as PNG files and one sheet."""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Sequence

import numpy as np
import tqdm

from dalle_jax import files
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.errors import UserError, say, writing_to
from dalle_jax.models import decoding
from dalle_jax.pictures.picture import Picture
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.autoregressive import OPTIONS
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import COMMON, Option, Preview, Request, check, is_blank

SHEET = "sheet.png"
BAR = "{l_bar}{bar}| {n:.2f} of {total} captions [{elapsed}<{remaining}]"
MAX_NAME_BYTES = 80  # of a caption in a file name
DEFAULT_N = 4


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `load` reads: which model, and how devices hold it."""
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument(
        "--clip", type=pathlib.Path, metavar="DIR", help="workdir of the CLIP that ranks (default: DIR/clip, if any)"
    )
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices that share one copy of the model (default: 1)"
    )
    parser.add_argument(
        "--weights", choices=decoding.WEIGHTS, default="model", help="how weights are stored (default: model)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="draw with a run's parameters themselves (default: their moving average)"
    )


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline of `add_loading_arguments`; raises what `Pipeline.load` does."""
    return Pipeline.load(args.model, clip=args.clip, tensor=args.tensor, weights=args.weights, average=not args.raw)


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    default = option.unset if option.default is None else f"{option.default:g}"
    parser.add_argument(
        option.flag,
        type=option.kind,
        default=option.default,
        metavar="N" if option.kind is int else "X",
        help=f"{option.help} (default: {default})",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help="what to draw; several are drawn together")
    for option in COMMON:
        add_option(parser, dataclasses.replace(option, default=DEFAULT_N) if option.name == "n" else option)
    for option in OPTIONS:
        add_option(parser, option)
    parser.add_argument(
        "--image", type=pathlib.Path, metavar="FILE", help="image to complete from its top rows (default: none)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("samples"),
        metavar="DIR",
        help="folder for the PNG files and the sheet (default: samples)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a sentence)")


def main(args: argparse.Namespace) -> int:
    """Write OUT/CAPTION-SEED.png for each image and OUT/sheet.png, and say how many are drawn at a time. Returns 0."""
    requests = _requests(args)
    seed = requests[0].seed
    with writing_to(args.out):
        files.prepare(args.out)
    pipe = load(args)
    _warn_of_cut_captions(pipe, requests)
    start = time.monotonic()
    images, reason = pipe.capacity(guided=args.guidance != 1)
    if not args.json:
        say(reason)
    flat = [picture for row in _draw(pipe, requests) for picture in row]
    paths = [args.out / name for name in file_names(flat)]
    sheet = contact_sheet(
        [np.asarray(picture) for picture in flat], [_title(picture) for picture in flat], columns=min(args.n, 8)
    )
    with writing_to(args.out):
        for picture, path in zip([*flat, sheet], [*paths, args.out / SHEET], strict=True):
            with files.replacing(path) as aside:
                picture.save(aside, "PNG")
    seconds = time.monotonic() - start
    if args.json:
        made = [
            {"file": str(path), "caption": p.caption, "seed": p.seed, "score": p.score, "settings": p.settings}
            for p, path in zip(flat, paths, strict=True)
        ]
        whole = {"pictures": made, "seed": seed, "sheet": str(args.out / SHEET), "wave": images, "seconds": seconds}
        print(json.dumps(whole))
    else:
        counts = f"{len(flat)} pictures of {len(args.captions)} caption(s)"
        print(f"{counts}, from seed {seed}, in {seconds:.1f} s: {args.out / SHEET}")
    return 0


def file_names(pictures: Sequence[Picture]) -> list[str]:
    """CAPTION-SEED.png; where captions look alike as file names, CAPTION-SEED-2.png and so on."""
    names: list[str] = []
    for picture in pictures:
        words = re.sub(r"[^\w]+", "-", picture.caption.lower()).strip("-")
        words = words.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "caption"
        stem = f"{words}-{picture.seed}"
        choices = itertools.chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in itertools.count(2)))
        names.append(next(name for name in choices if name not in names))
    return names


def read_image(path: pathlib.Path) -> np.ndarray:
    """uint8 [H, W, 3] of an image file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadImage) as error:
        raise UserError(f"expected an image to complete, got {path} ({error}): check the file") from error


def _requests(args: argparse.Namespace) -> list[Request]:
    """The requests of a command line, checked as far as that needs no model.

    Raises:
      UserError: a blank caption, a number out of its range, or an image that cannot be read.
    """
    common = {option.name: getattr(args, option.name) for option in COMMON}
    options = {o.name: value for o in OPTIONS if (value := getattr(args, o.name)) != o.default}
    image = None if args.image is None else read_image(args.image)
    requests = Request("", **common, image=image, options=options).for_captions(args.captions)
    for request in requests:
        check(request, OPTIONS)
        if is_blank(request.caption):
            raise UserError(f"expected words in each CAPTION, got {request.caption!r}: say what to draw")
    return requests


def _warn_of_cut_captions(pipe: Pipeline, requests: Sequence[Request]) -> None:
    for request in requests:
        usage = pipe.generator.usage(request)
        if usage.text_tokens > usage.max_text_tokens:
            words = f"{request.caption[:40]!r}{'...' * (len(request.caption) > 40)}"
            counts = f"has {usage.text_tokens} tokens, of which the model reads {usage.max_text_tokens}"
            say(f"dalle-jax: warning: {words} {counts}: shorten it")


def _draw(pipe: Pipeline, requests: Sequence[Request]) -> Iterable[Sequence[Picture]]:
    """The pictures of each request, with a progress bar on a terminal."""
    watched, shares = sys.stderr.isatty(), [0.0] * len(requests)
    with tqdm.tqdm(total=len(requests), unit="caption", disable=not watched, bar_format=BAR) as bar:

        def on_progress(preview: Preview) -> None:
            shares[preview.request] = preview.share
            bar.update(sum(shares) - bar.n)

        return pipe.draw(requests, on_progress=on_progress if watched else None)


def _title(picture: Picture) -> str:
    return picture.caption if picture.score is None else f"{picture.caption} ({picture.score:.3f})"
