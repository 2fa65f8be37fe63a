"""The report of an evaluation: report.json, report.md with its table, blur.png with its curve, and repeating one.

Beside the scores it shows what others have printed about DALL-E and its rivals on MS-COCO, with who printed it. They do
not agree: the paper prints curves and no figures (section 3.1, figure 9), so every figure of its FID is somebody's
reading. Knows the report's form; computes no score.
"""

import collections
import importlib.metadata
import json
import math
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

import dalle_jax
from dalle_jax import files
from dalle_jax.config import differences, flatten
from dalle_jax.errors import UserError
from dalle_jax.evaluate.features import FeatureSet
from dalle_jax.evaluate.protocol import DIGESTS, Evaluation, Expected
from dalle_jax.pictures import plot

REPORT, TABLE, CURVE = "report.json", "report.md", "blur.png"
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")
COLUMNS = {
    "fid": ("FID", ".4f"),
    "inception_score": ("IS", ".3f"),
    "kid": ("KID", ".5f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
}  # score -> heading, format
NO_INCEPTION = "Features of a CLIP, not of Inception: these numbers compare with each other, not with published ones."
SAME_FID = 1e-3  # absolute; what two good implementations differ by

PUBLISHED_WARNING = (
    "The paper prints no figures, only curves, and those that circulate for DALL-E conflict: 27.5, about 28, 34.6 and "
    "17.89 for the same model without blur. They differ in network, resize, captions and reference, and what a radius "
    "of blur means was never said. None of them is known to come from this protocol."
)


COGVIEW = "Ding et al. 2021 (CogView), table 1"
RADII = (0.0, 1.0, 2.0, 4.0, 8.0)
# FID at each of RADII, and the Inception score without blur, as CogView prints them.
CURVES = {
    "AttnGAN": ((35.2, 44.0, 72.0, 108.0, 100.0), 23.3),
    "DM-GAN": ((26.5, 39.0, 73.0, 119.0, 112.3), 32.2),
    "DF-GAN": ((26.5, 33.8, 55.9, 91.0, 97.0), 18.7),
    "DALL-E": ((27.5, 28.0, 45.5, 83.5, 85.0), 17.9),
    "CogView": ((27.1, 19.4, 13.9, 19.4, 23.6), 18.2),
}
# FID of DALL-E on MS-COCO without blur, by who prints it.
CONFLICTING = (
    ("27.5", "CogView (Ding et al. 2021), NUWA (Wu et al. 2021), ERNIE-ViLG (Zhang et al. 2021), minDALL-E (2021)"),
    ("about 28", "GLIDE (Nichol et al. 2021), DALL-E 2 (Ramesh et al. 2022)"),
    ("34.60", "Make-A-Scene (Gafni et al. 2022), of their own reimplementation"),
    ("17.89", "tables of Muse (Chang et al. 2023) and Kandinsky (Razzhigaev et al. 2023); where from is not said"),
)
CUB_PROTOCOL = "dalle-cub"
CUB = "about 56: 16.09 of DM-GAN (its repository) and the nearly 40 more of section 3.1"
CUB_SCORE = (
    "Published Inception scores on CUB are by a network trained on birds, which is not here: this one's does not "
    "compare with them."
)
COCO_PROTOCOLS = ("dalle-coco-30k", "dm-gan-coco-30k", "coco-30k-pytorch", "coco-30k-clean", "coco-30k-tf1")


def versions() -> dict[str, str]:
    """Versions of this package, its libraries and Python, and the device."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    return {"dalle-jax": dalle_jax.__version__, **found, "python": platform.python_version(), "device": device}


def described(source: str, found: FeatureSet, crop: str) -> dict[str, Any]:
    """A set of pictures in a report."""
    sizes = sorted(collections.Counter(row.size for row in found.rows).items())
    return {
        "source": source,
        "count": len(found),
        "dropped": found.dropped,
        "sizes": {f"{width}x{height}": count for (height, width), count in sizes},
        "crop": crop,
        "sha256": found.digest,
    }


def load(path: pathlib.Path) -> Evaluation:
    """The evaluation of a report, which expects again what the report has.

    Raises:
      UserError: no report, or a value in it that cannot be.
    """
    try:
        report = json.loads(path.read_text())
        values, flat = dict(report["evaluation"]), flatten(report)
        digests = {name: flat.get(name) for name in DIGESTS}
        if not all(isinstance(digest, str | None) for digest in digests.values()):
            raise TypeError(f"digests {digests}")
        expected = Expected(str(path), digests, dict(report["scores"]), dict(report["versions"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected a report of `dalle-jax evaluate` in {path}, got {error!r}: check the path"
        ) from error
    try:
        return Evaluation.from_json({**values, "expected": expected}, where=str(path))
    except UserError as error:
        version = expected.versions.get("dalle-jax")
        raise UserError(f"{path} is of dalle-jax {version}, which can repeat it; here {error}") from error


def compared(made: dict[str, Any], expected: Expected) -> dict[str, Any]:
    """A report that also says what it repeats and by how much the scores differ.

    Raises:
      UserError: the pictures were given, not drawn, and are others now.
    """
    sha256, notes = made["pictures"]["sha256"], list(made["notes"])
    if "drawn" not in made:
        expected.check("pictures.sha256", sha256)
    elif expected.digests["pictures.sha256"] != sha256:
        notes.append("the drawn pictures are not bit for bit those of the report, see versions")
    apart = {
        name: made["scores"].get(name, math.nan) - value
        for name, value in expected.scores.items()
        if isinstance(value, int | float) and made["scores"].get(name, math.nan) != value
    }
    changed = differences(expected.versions, made["versions"])
    repeats = {"report": expected.report, "differences": apart, "versions_changed": changed}
    return {**made, "notes": notes, "repeats": repeats}


def repetition(report: Mapping[str, Any]) -> tuple[str, bool]:
    """One sentence on how a repetition came out, and whether FID is the same."""
    repeats = report["repeats"]
    apart = repeats["differences"]
    if not apart:
        return f"repeats {repeats['report']}: every score is the same", True
    listed = ", ".join(f"{name} {value:+.3g}" for name, value in apart.items())
    return f"repeats {repeats['report']} with {listed}", abs(apart.get("fid", 0.0)) <= SAME_FID


def write(out: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes the report, its table and, of several radii, the curve.

    Raises:
      OSError: the folder cannot be written.
    """
    files.write(out / TABLE, table(report).encode(errors="surrogateescape"))  # names of files need not be text
    if len(report["blur"]) > 1:
        _save_curve(out / CURVE, report)
    files.write(out / REPORT, json.dumps(report, indent=1) + "\n")  # last: all is there


def sentence(report: Mapping[str, Any], path: pathlib.Path) -> str:
    """One line for the terminal."""
    scores, images, measure = report["scores"], report["pictures"], report["evaluation"]["measure"]
    lost = f", {sum(images['dropped'].values())} unreadable" if images["dropped"] else ""
    listed = [f"{heading} {scores[name]:{form}}" for name, (heading, form) in COLUMNS.items() if name in scores]
    listed += [f"CLIP score {scores['clip_score']:.4f}"] if "clip_score" in scores else []
    how = report["network"] + ("" if measure["features"] == "clip" else f", {measure['resize']}")
    return f"{', '.join(listed)} of {images['count']} pictures{lost} ({how}): {path}"


def table(report: Mapping[str, Any]) -> str:
    """The scores by radius of blur as Markdown, beside the published ones where the protocol is that of MS-COCO."""
    images, reference, measure = report["pictures"], report["reference"], report["evaluation"]["measure"]
    names = [name for name in COLUMNS if any(name in row for row in report["blur"])]
    lines = [f"# {report['protocol'] or 'Evaluation'}", ""]
    lines += [NO_INCEPTION, ""] if measure["features"] == "clip" else []
    crop = measure["crop"] + (f", the reference {measure['reference_crop']}" if measure["reference_crop"] else "")
    lines += [
        f"{images['count']} pictures ({images['source']}) against {reference['count'] or 'an unknown number'} "
        f"({reference['source']}), "
        f"{report['network']} {report['weights'][:12]}, resize {report['resize']}, crop {crop}.",
        "",
        *_more(report),
        _row("blur radius", *(COLUMNS[name][0] for name in names)),
        _row(*["---"] * (len(names) + 1)),
    ]
    for row in report["blur"]:
        values = [f"{row[name]:{COLUMNS[name][1]}}" if name in row else "" for name in names]
        lines.append(_row(f"{row['radius']:g}", *values))
    lines.append("")
    for name, heading in (("clip_score", "CLIP score"), ("r_precision", "R-precision")):
        if name in report["scores"]:
            lines += [f"{heading} {report['scores'][name]:.4f} (CLIP {report['clip']['digest'][:12]}).", ""]
    lines += [f"- {note}" for note in report["notes"]] + ([""] if report["notes"] else [])
    if report["protocol"] in COCO_PROTOCOLS:
        lines += _published()
    elif report["protocol"] == CUB_PROTOCOL:
        lines += [f"FID of DALL-E on CUB by the paper: {CUB}.", ""]
    return "\n".join(lines)


def _more(report: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what made the pictures, what scored their classes, and what the reference shares with training."""
    paragraphs, draw = [], report["evaluation"]["draw"]
    if "drawn" in report:
        ranked_by = report["drawn"]["ranked_by"]
        chosen = f"the best of {draw['best_of']} each by CLIP {ranked_by[:12]}, " if ranked_by else ""
        paragraphs += [f"Drawn by checkpoint {report['drawn']['checkpoint'][:12]}, {chosen}seed {draw['seed']}."]
    if "scored_by" in report:
        scored = report["scored_by"]
        paragraphs += [f"IS by {scored['network']} {scored['digest'][:12]}, resize {scored['resize']}."]
    if "overlap" in report:
        found = report["overlap"]
        paragraphs += [
            f"{found['duplicates']} pictures of the reference ({found['share']:.1%}) have one of {found['source']} at "
            f"a cosine of {found['min_cosine']:g} or more by CLIP {found['clip'][:12]} and "
            f"{'were left out' if found['removed'] else 'count all the same'}."
        ]
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _published() -> list[str]:
    lines = ["## Published", "", PUBLISHED_WARNING, ""]
    lines += [_row("FID by blur radius", *(f"{radius:g}" for radius in RADII), "IS", "source")]
    lines += [_row(*["---"] * (len(RADII) + 3))]
    lines += [_row(model, *(f"{fid:g}" for fid in fids), score, COGVIEW) for model, (fids, score) in CURVES.items()]
    lines += ["", _row("FID of DALL-E without blur", "who prints it"), _row("---", "---")]
    return [*lines, *(_row(*pair) for pair in CONFLICTING), ""]


def _row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _save_curve(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """FID and Inception score over the radius of blur; the published curves beside it where they belong."""
    rows = report["blur"]
    scores = [name for name in ("fid", "inception_score") if all(name in row for row in rows)]
    with_published = report["protocol"] in COCO_PROTOCOLS
    ours = "this evaluation" + (", not the protocol as it is" if report["evaluation"]["departures"] else "")
    networks = {"fid": report["network"], "inception_score": report.get("scored_by", report)["network"]}
    with plot.figure(path, width=6 * len(scores), height=4.8) as figure:
        for index, name in enumerate(scores):
            axes = figure.add_subplot(1, len(scores), index + 1)
            radii, values = zip(*sorted((row["radius"], row[name]) for row in rows), strict=True)
            axes.plot(radii, values, marker="o", linewidth=2.5, color="black", label=ours)
            for model, (fids, score) in CURVES.items() if with_published else ():
                if name == "fid":
                    axes.plot(RADII, fids, marker=".", alpha=0.7, label=model)
                else:
                    axes.plot([0], [score], marker="_", markersize=12, linestyle="", label=model)
            axes.set_xlabel("radius of the Gaussian blur of both sets, pixels")
            axes.set_xticks(radii)
            low, high = min(0, *values), max(axes.dataLim.y1, 1e-6)  # a set and itself: 0, or rounding below it
            axes.set_ylim(low, high + 0.08 * (high - low))
            axes.set_title(f"{COLUMNS[name][0]} ({networks[name]})", fontsize=10)
            axes.legend(fontsize=7)
        if with_published:
            note = f"Others: {COGVIEW}. {PUBLISHED_WARNING}"
            figure.text(0.01, 0.01, note, fontsize=7, wrap=True)
        elif report["evaluation"]["measure"]["features"] == "clip":
            figure.text(0.01, 0.01, NO_INCEPTION, fontsize=7)
        figure.subplots_adjust(bottom=0.2)
