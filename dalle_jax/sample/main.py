"""`dalle-jax sample`: pictures for captions, as PNG files and one sheet."""

import argparse
import json
import pathlib
import re
import sys
import time

import numpy as np
import tqdm
from PIL import Image, UnidentifiedImageError

from dalle_jax.errors import UserError
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.sheet import contact_sheet

SHEET = "sheet.png"
SHEET_SIDE = 128  # pixels that a small picture is enlarged to on the sheet, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    parser.add_argument("-n", type=int, default=4, help="pictures per caption (default 4)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has seed + 1 (default 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0; 1 is the paper's (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely codes")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the codes that reach probability P")
    parser.add_argument("--image", type=pathlib.Path, metavar="FILE", help="picture to complete from its top rows")
    parser.add_argument("--keep-rows", type=int, metavar="R", help="rows of codes to keep of it (default: half)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")


def main(args: argparse.Namespace) -> int:
    """Writes OUT/CAPTION-SEED.png for each picture and OUT/sheet.png. Returns 0."""
    pipe = Pipeline.load(args.model)
    image = None if args.image is None else _open(args.image)
    start = time.monotonic()
    with tqdm.tqdm(total=args.n * len(args.captions), unit="picture", disable=not sys.stderr.isatty()) as bar:
        pictures = pipe(
            args.captions,
            n=args.n,
            seed=args.seed,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            image=image,
            keep_rows=args.keep_rows,
            on_progress=lambda finished: bar.update(finished - bar.n),
        )
    flat = [picture for row in pictures for picture in row]
    files = [args.out / f"{_file_name(picture.caption)}-{picture.seed}.png" for picture in flat]
    sheet = contact_sheet(
        [np.asarray(picture) for picture in flat],
        [picture.caption for picture in flat],
        columns=min(args.n, 8),
        scale=max(1, SHEET_SIDE // pipe.image_size),
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
        print(json.dumps({"pictures": made, "sheet": str(args.out / SHEET), "seconds": seconds}))
    else:
        print(f"{len(flat)} pictures of {len(args.captions)} caption(s) in {seconds:.1f} s: {args.out / SHEET}")
    return 0


def _open(path: pathlib.Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"expected a picture to complete, got {path} ({error}): check the file") from error


def _file_name(caption: str) -> str:
    return re.sub(r"[^\w]+", "-", caption.lower()).strip("-")[:80] or "caption"
