"""`dalle-jax sample`: pictures for captions, as PNG files and one sheet."""

import argparse
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Sequence

import numpy as np
import tqdm

from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.errors import UserError, say
from dalle_jax.models import decoding
from dalle_jax.pictures.picture import Picture
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Preview

SHEET = "sheet.png"
BAR = "{l_bar}{bar}| {n:.2f} of {total} captions [{elapsed}<{remaining}]"
MOST_NAME_BYTES = 80  # of a caption in a file name


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is held: what `load` reads."""
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument("--clip", type=pathlib.Path, metavar="DIR", help="CLIP that ranks (default: DIR/clip)")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share one copy of the model")
    parser.add_argument("--weights", choices=decoding.WEIGHTS, default="model", help="precision to hold the weights in")


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline of `add_loading_arguments`; raises what `Pipeline.load` does."""
    return Pipeline.load(args.model, clip=args.clip, tensor=args.tensor, weights=args.weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    parser.add_argument("-n", type=int, default=4, help="pictures per caption (default 4)")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="draw N candidates a caption, keep the n that CLIP ranks best"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has seed + 1 (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0.001 .. 1000; 1 is the paper's (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely codes")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the codes that reach probability P")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="above 1 follows the caption more closely (default 1)"
    )
    parser.add_argument("--image", type=pathlib.Path, metavar="FILE", help="picture to complete from its top rows")
    parser.add_argument("--keep-rows", type=int, metavar="R", help="rows of codes to keep of it (default: half)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")


def main(args: argparse.Namespace) -> int:
    """Writes OUT/CAPTION-SEED.png for each picture and OUT/sheet.png, says how many are drawn at a time. Returns 0."""
    pipe = load(args)
    image = None if args.image is None else _open(args.image)
    start = time.monotonic()
    images, told = pipe.wave(guided=args.guidance != 1)
    if not args.json:
        say(told)
    shares = [0.0] * len(args.captions)
    with tqdm.tqdm(total=len(shares), unit="caption", disable=not sys.stderr.isatty(), bar_format=BAR) as bar:

        def on_rows(preview: Preview) -> None:
            shares[preview.request] = preview.share
            bar.update(sum(shares) - bar.n)

        pictures = pipe(
            args.captions,
            n=args.n,
            best_of=args.best_of,
            seed=args.seed,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            guidance=args.guidance,
            image=image,
            keep_rows=args.keep_rows,
            on_rows=on_rows if sys.stderr.isatty() else None,
        )
    flat = [picture for row in pictures for picture in row]
    files = [args.out / name for name in file_names(flat)]
    sheet = contact_sheet(
        [np.asarray(picture) for picture in flat],
        [_title(picture) for picture in flat],
        columns=min(args.n, 8),
    )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for picture, file in zip(flat, files, strict=True):
            picture.save(file)
        sheet.save(args.out / SHEET)
    except OSError as error:
        raise UserError(f"expected a folder to write to, got {args.out} ({error.strerror}): choose another") from error
    seconds = time.monotonic() - start
    if args.json:
        made = [{"file": str(file), **picture.metadata()} for picture, file in zip(flat, files, strict=True)]
        print(json.dumps({"pictures": made, "sheet": str(args.out / SHEET), "wave": images, "seconds": seconds}))
    else:
        print(f"{len(flat)} pictures of {len(args.captions)} caption(s) in {seconds:.1f} s: {args.out / SHEET}")
    return 0


def _title(picture: Picture) -> str:
    return picture.caption if picture.score is None else f"{picture.caption} ({picture.score:.3f})"


def _open(path: pathlib.Path) -> np.ndarray:
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadImage) as error:
        raise UserError(f"expected a picture to complete, got {path} ({error}): check the file") from error


def file_names(pictures: Sequence[Picture]) -> list[str]:
    """CAPTION-SEED.png; where captions look alike as file names, CAPTION-SEED-2.png and so on."""
    names: list[str] = []
    for picture in pictures:
        words = re.sub(r"[^\w]+", "-", picture.caption.lower()).strip("-")
        words = words.encode()[:MOST_NAME_BYTES].decode(errors="ignore") or "caption"
        stem = f"{words}-{picture.seed}"
        ways = itertools.chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in itertools.count(2)))
        names.append(next(name for name in ways if name not in names))
    return names
