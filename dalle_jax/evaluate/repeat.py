"""`dalle-jax evaluate --from report.json`: the same evaluation again, as long as nothing it depends on has changed."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from dalle_jax import config as configs
from dalle_jax.errors import UserError
from dalle_jax.evaluate.protocol import Evaluation

SAME_FID = 1e-3  # absolute; what two good implementations differ by
PLACES = ("source", "reference", "pictures", "weights", "score_weights", "clip", "draw.clip", "overlap.source")
# What must not change -> where a report says it, and what it is.
DIGESTS = {
    "weights": (("weights",), "weights of the network"),
    "score_weights": (("scored_by", "digest"), "weights of the Inception score's network"),
    "clip": (("clip", "digest"), "CLIP"),
    "checkpoint": (("drawn", "checkpoint"), "checkpoint that draws"),
    "ranked_by": (("drawn", "ranked_by"), "CLIP that chooses"),
    "captions_sha256": (("drawn", "captions_sha256"), "captions of the source"),
    "reference": (("reference", "sha256"), "pictures of the reference"),
    "pictures": (("pictures", "sha256"), "pictures"),
}


@dataclasses.dataclass(frozen=True)
class Expected:
    """The report that is repeated; without one nothing is expected."""

    path: str = ""
    report: dict[str, Any] | None = None

    def check(self, name: str, digest: str | None) -> None:
        """Raises UserError if what `DIGESTS` calls so is not what it was."""
        if self.report is None:
            return
        was: Any = self.report
        for key in DIGESTS[name][0]:
            was = was.get(key) if isinstance(was, dict) else None
        if was != digest:
            raise UserError(
                f"expected the {DIGESTS[name][1]} of {self.path}, sha256 {_short(was)}, got {_short(digest)}: give the "
                "same, or evaluate anew without --from"
            )

    def finish(self, made: dict[str, Any]) -> None:
        """Say in the new report what it repeats and by how much the scores differ.

        Raises:
          UserError: the pictures were given, not drawn, and are others now.
        """
        if self.report is None:
            return
        old = self.report
        if "drawn" not in old:
            self.check("pictures", made["pictures"]["sha256"])
        elif old["pictures"]["sha256"] != made["pictures"]["sha256"]:
            made["notes"].append("the drawn pictures are not bit for bit those of the report, see versions")
        differences = {
            name: made["scores"].get(name, math.nan) - value
            for name, value in old["scores"].items()
            if isinstance(value, int | float) and made["scores"].get(name, math.nan) != value
        }
        changed = configs.differences(old["versions"], made["versions"])
        made["repeats"] = {"report": self.path, "differences": differences, "versions_changed": changed}

    @staticmethod
    def told(made: dict[str, Any]) -> tuple[str, bool]:
        """One sentence on how a repetition came out, and whether FID is the same."""
        found = made["repeats"]
        apart = found["differences"]
        same = abs(apart.get("fid", 0.0)) <= SAME_FID
        if not apart:
            return f"repeats {found['report']}: every score is the same", same
        listed = ", ".join(f"{name} {value:+.3g}" for name, value in apart.items())
        return f"repeats {found['report']} with {listed}", same


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:16]}..."


def load(path: pathlib.Path, overrides: Sequence[str]) -> tuple[Evaluation, Expected]:
    """The evaluation of a report, with new places for what has moved: words like `--config.source=...`.

    Raises:
      UserError: no report, one that draws nothing anew from, or an override that is no place.
    """
    try:
        report = json.loads(path.read_text())
        values = report["evaluation"]
        report = {**report, "scores": dict(report["scores"]), "versions": dict(report["versions"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"expected a report of `dalle-jax evaluate` in {path}, got {error!r}: check the path"
        ) from error
    for word in overrides:
        name, _, value = word.removeprefix(configs.OVERRIDE).partition("=")
        if name not in PLACES:
            raise UserError(
                f"expected only new places ({', '.join(PLACES)}) with --from, got {word!r}: a report repeats the rest"
            )
        folder, _, key = name.rpartition(".")
        holder = values[folder] if folder else values
        if holder is None:
            raise UserError(f"expected a report of drawn pictures for {word!r}, got one of pictures that were given")
        holder[key] = value
    return Evaluation.from_json(values, where=str(path)), Expected(str(path), report)
