"""The report on reconstructions: reconstructions.json, its table in .md, and a sheet of pictures in .png.

Knows the report's form; computes no score.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax import files
from dalle_jax.pictures.sheet import contact_sheet

REPORT, TABLE, SHEET = "reconstructions.json", "reconstructions.md", "reconstructions.png"


def _decibels(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


# Score -> heading, and the text of a value. PSNR is None where it is infinite.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rfid": ("rFID", "{:.2f}".format),
    "psnr": ("PSNR, mean", _decibels),
    "psnr_pooled": ("PSNR, pooled", _decibels),
    "ssim": ("SSIM", "{:.4f}".format),
    "lpips": ("LPIPS", "{:.4f}".format),
    "edge_error": ("edge error", "{:.4f}".format),
    "size": ("pixels", str),
    "tokens": ("tokens", str),
    "bits": ("bits", "{:.0f}".format),
    "entropy_bits": ("bits by entropy", "{:.0f}".format),
    "codes_used": ("codes used", str),
    "vocab": ("of", str),
    "perplexity": ("perplexity", "{:.1f}".format),
    "parameters": ("parameters", "{:,}".format),
}


@dataclasses.dataclass
class Shown:
    """A column of the sheet: an original uint8 [H, W, 3] with its name, and its reconstructions with PSNR in dB."""

    key: str
    original: np.ndarray
    reconstructions: list[tuple[np.ndarray, float]] = dataclasses.field(default_factory=list)


def write(out: pathlib.Path, report: Mapping[str, Any], shown: Sequence[Shown]) -> None:
    """Writes the table, the sheet and the report.

    Raises:
      OSError: the folder cannot be written.
    """
    files.write(out / TABLE, table(report).encode(errors="surrogateescape"))  # names of files need not be text
    with files.replacing(out / SHEET) as aside:
        sheet(names(report), shown).save(aside, format="PNG")
    files.write(out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")  # last: all is there


def names(report: Mapping[str, Any]) -> list[str]:
    """Short names of the tokenizers: the last parts of their paths, or the whole paths where those are the same."""
    paths = [pathlib.Path(row["tokenizer"]) for row in report["tokenizers"]]
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else list(map(str, paths))


def sentence(report: Mapping[str, Any], path: pathlib.Path) -> str:
    """One line for the terminal."""
    rows = []
    for name, row in zip(names(report), report["tokenizers"], strict=True):
        scores = [f"{_heading(key)} {COLUMNS[key][1](row[key])}" for key in list(COLUMNS)[:6] if key in row]
        rows.append(f"{name} {', '.join(scores)}, {row['codes_used']} of {row['vocab']} codes")
    pictures = report["pictures"]
    return f"{'; '.join(rows)}; {pictures['count']} pictures ({pictures['source']}): {path}"


def table(report: Mapping[str, Any]) -> str:
    """A row for each tokenizer as Markdown, and what the numbers are of."""
    pictures, rows, network = report["pictures"], report["tokenizers"], report["network"]
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    by = "no rFID" if network is None else f"rFID by {network['name']} {network['digest'][:12]}, {network['resize']}"
    lines = [
        "# Reconstructions",
        "",
        f"{pictures['count']} pictures ({pictures['source']}), the middle square of each; {by}"
        f"{'' if report['lpips'] is None else ', LPIPS ' + report['lpips'][:12]}.",
        "",
        _row("tokenizer", *(COLUMNS[key][0] for key in keys)),
        _row(*["---"] * (len(keys) + 1)),
        *(
            _row(name, *(COLUMNS[key][1](row[key]) if key in row else "" for key in keys))
            for name, row in zip(names(report), rows, strict=True)
        ),
        "",
        "PSNR in dB: the mean over pictures, and that of the mean squared error. Bits of a picture: tokens times the "
        "logarithm of the vocabulary, or times the entropy of the codes.",
        "",
        *(f"- {row['tokenizer']}: {row['model']} {row['digest'][:12]}" for row in rows),
        *(f"- {note}" for note in report["notes"]),
        "",
    ]
    return "\n".join(lines)


def sheet(tokenizers: Sequence[str], shown: Sequence[Shown]):
    """Originals in the first row, and below them a row of each tokenizer's reconstructions with their PSNR."""
    images, captions = [column.original for column in shown], [column.key for column in shown]
    for number, name in enumerate(tokenizers):
        for column in shown:
            image, ratio = column.reconstructions[number]
            images.append(image)
            captions.append(f"{name} {_decibels(ratio if math.isfinite(ratio) else None)} dB")
    return contact_sheet(images, captions, columns=len(shown))


def _heading(key: str) -> str:
    return COLUMNS[key][0].replace(",", "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
