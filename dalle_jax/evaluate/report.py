"""What an evaluation writes for people: report.json, report.md with its table, blur.png with its curve.

Knows the report's form; computes no score.
"""

import collections
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import dalle_jax
from dalle_jax import files
from dalle_jax.evaluate import published
from dalle_jax.evaluate.features import Found
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


def versions() -> dict[str, str]:
    """What computed: this package, its libraries, Python and the device."""
    import jax

    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    return {"dalle-jax": dalle_jax.__version__, **found, "python": platform.python_version(), "device": device}


def described(source: str, found: Found, crop: str) -> dict[str, Any]:
    """A set of pictures in a report."""
    sizes = sorted(collections.Counter(found.sizes).items())
    return {
        "source": source,
        "count": len(found),
        "dropped": found.dropped,
        "sizes": {f"{width}x{height}": count for (height, width), count in sizes},
        "crop": crop,
        "sha256": found.digest,
    }


def write(out: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes the report, its table and, of several radii, the curve.

    Raises:
      OSError: the folder cannot be written.
    """
    files.write(out / TABLE, table(report))
    if len(report["blur"]) > 1:
        _save_curve(out / CURVE, report)
    files.write(out / REPORT, json.dumps(report, indent=1) + "\n")  # last: all is there


def sentence(report: Mapping[str, Any], path: pathlib.Path) -> str:
    """One line for the terminal."""
    scores, pictures, measure = report["scores"], report["pictures"], report["evaluation"]["measure"]
    lost = f", {sum(pictures['dropped'].values())} unreadable" if pictures["dropped"] else ""
    told = [f"{heading} {scores[name]:{form}}" for name, (heading, form) in COLUMNS.items() if name in scores]
    told += [f"CLIP score {scores['clip_score']:.4f}"] if "clip_score" in scores else []
    how = report["network"] + ("" if measure["features"] == "clip" else f", {measure['resize']}")
    return f"{', '.join(told)} of {pictures['count']} pictures{lost} ({how}): {path}"


def table(report: Mapping[str, Any]) -> str:
    """The scores by radius of blur as Markdown, beside the published ones where the protocol is that of MS-COCO."""
    pictures, reference, measure = report["pictures"], report["reference"], report["evaluation"]["measure"]
    names = [name for name in COLUMNS if any(name in row for row in report["blur"])]
    lines = [f"# {report['protocol'] or 'Evaluation'}", ""]
    lines += [NO_INCEPTION, ""] if measure["features"] == "clip" else []
    crop = measure["crop"] + (f", the reference {measure['reference_crop']}" if measure["reference_crop"] else "")
    lines += [
        f"{pictures['count']} pictures ({pictures['source']}) against {reference['count']} ({reference['source']}), "
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
    if report["protocol"] in published.PROTOCOLS:
        lines += _published()
    elif report["protocol"] == published.CUB_PROTOCOL:
        lines += [f"FID of DALL-E on CUB by the paper: {published.CUB}.", ""]
    return "\n".join(lines)


def _more(report: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what made the pictures, what scored their classes, and what the reference shares with training."""
    said, draw = [], report["evaluation"]["draw"]
    if "drawn" in report:
        ranked_by = report["drawn"]["ranked_by"]
        chosen = f"the best of {draw['best_of']} each by CLIP {ranked_by[:12]}, " if ranked_by else ""
        said += [f"Drawn by checkpoint {report['drawn']['checkpoint'][:12]}, {chosen}seed {draw['seed']}."]
    if "scored_by" in report:
        scored = report["scored_by"]
        said += [f"IS by {scored['network']} {scored['digest'][:12]}, resize {scored['resize']}."]
    if "overlap" in report:
        found = report["overlap"]
        said += [
            f"{found['duplicates']} pictures of the reference ({found['share']:.1%}) have one of {found['source']} at "
            f"a cosine of {found['least']:g} or more by CLIP {found['clip'][:12]} and "
            f"{'were left out' if found['removed'] else 'count all the same'}."
        ]
    return [line for paragraph in said for line in (paragraph, "")]


def _published() -> list[str]:
    radii = list(published.CURVES[0].fid)
    lines = ["## Published", "", published.WARNING, ""]
    lines += [_row("FID by blur radius", *(f"{radius:g}" for radius in radii), "IS", "source")]
    lines += [_row(*["---"] * (len(radii) + 3))]
    for curve in published.CURVES:
        lines.append(_row(curve.model, *(f"{curve.fid[r]:g}" for r in radii), curve.inception_score, curve.source))
    lines += ["", _row("FID of DALL-E without blur", "who prints it"), _row("---", "---")]
    return [*lines, *(_row(*pair) for pair in published.CONFLICTING), ""]


def _row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _save_curve(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    """FID and Inception score over the radius of blur; the published curves beside it where they belong."""
    rows = report["blur"]
    scores = [name for name in ("fid", "inception_score") if all(name in row for row in rows)]
    with_published = report["protocol"] in published.PROTOCOLS
    ours = "this evaluation" + (", not the protocol as it is" if report["evaluation"]["departures"] else "")
    networks = {"fid": report["network"], "inception_score": report.get("scored_by", report)["network"]}
    with plot.figure(path, width=6 * len(scores), height=4.8) as figure:
        for index, name in enumerate(scores):
            axes = figure.add_subplot(1, len(scores), index + 1)
            radii, values = zip(*sorted((row["radius"], row[name]) for row in rows), strict=True)
            axes.plot(radii, values, marker="o", linewidth=2.5, color="black", label=ours)
            for curve in published.CURVES if with_published else ():
                if name == "fid":
                    axes.plot(*zip(*curve.fid.items(), strict=True), marker=".", alpha=0.7, label=curve.model)
                else:
                    axes.plot([0], [curve.inception_score], marker="_", markersize=12, linestyle="", label=curve.model)
            axes.set_xlabel("radius of the Gaussian blur of both sets, pixels")
            axes.set_xticks(radii)
            low, high = min(0, *values), max(axes.dataLim.y1, 1e-6)  # a set and itself: 0, or rounding below it
            axes.set_ylim(low, high + 0.08 * (high - low))
            axes.set_title(f"{COLUMNS[name][0]} ({networks[name]})", fontsize=10)
            axes.legend(fontsize=7)
        if with_published:
            note = f"Others: {published.COGVIEW}. {published.WARNING}"
            figure.text(0.01, 0.01, note, fontsize=7, wrap=True)
        elif report["evaluation"]["measure"]["features"] == "clip":
            figure.text(0.01, 0.01, NO_INCEPTION, fontsize=7)
        figure.subplots_adjust(bottom=0.2)
