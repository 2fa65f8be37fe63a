"""Files with the mean and covariance of a set's features: pytorch-fid's .npz (mu, sigma), and in ours what made them.

A file of pytorch-fid says neither which network nor how many pictures; ours does, and a distance between statistics
of two networks is refused where both are known.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from dalle_jax import files
from dalle_jax.errors import UserError, writing_to

COMMON = ("network", "weights", "resize", "crop", "side", "blur")  # what two sets must have in common
SYMMETRIC = 1e-6  # of the largest entry: single precision files are read too


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean float64 [F] and covariance float64 [F, F] of `count` pictures, None if that is not known.

    about: what made them, strings under the names of COMMON; 'weights' is a sha256.
    """

    mean_F: np.ndarray
    covariance_FF: np.ndarray
    count: int | None = None
    about: dict[str, str] = dataclasses.field(default_factory=dict)


def check_place(path: str | os.PathLike) -> None:
    """Raises UserError if `save` could not write there: before the work whose result it is."""
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise UserError(f"expected a statistics file ending in .npz, got {path}: name it so")
    with writing_to(path, "place"):
        files.probe(path.parent)


def save(path: str | os.PathLike, statistics: Statistics) -> None:
    """Write a file that pytorch-fid reads too.

    Raises:
      UserError: the place cannot be written, or the name does not end in .npz.
    """
    check_place(path)
    about = json.dumps({"count": statistics.count, **statistics.about})
    with writing_to(path, "place"):
        with files.replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, mu=statistics.mean_F, sigma=statistics.covariance_FF, about=about)


def load(path: str | os.PathLike) -> Statistics:
    """Read a file of ours or of pytorch-fid.

    Raises:
      UserError: not there, not such a file, or a mean and covariance that cannot be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma")}
            about = json.loads(str(file["about"])) if "about" in file else {}
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"expected a file of statistics, got {path} ({reason}): check the path") from error
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(
            f"expected arrays mu and sigma in {path}, as pytorch-fid writes them, got {error}: compute them again"
        ) from error
    mean_F, covariance_FF = arrays["mu"], arrays["sigma"]
    if mean_F.ndim != 1 or covariance_FF.shape != 2 * mean_F.shape:
        raise UserError(
            f"expected mu [F] and sigma [F, F] in {path}, got {list(mean_F.shape)} and {list(covariance_FF.shape)}"
        )
    if not all(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in arrays.values()):
        raise UserError(f"expected finite numbers in {path}, got others: compute the statistics again")
    mean_F, covariance_FF = mean_F.astype(np.float64), covariance_FF.astype(np.float64)
    largest = np.abs(covariance_FF).max(initial=0.0)
    if (
        np.abs(covariance_FF - covariance_FF.T).max(initial=0.0) > SYMMETRIC * largest
        or (np.diag(covariance_FF) < 0).any()
    ):
        raise UserError(f"expected a covariance in {path}, symmetric and not negative, got none: compute it again")
    about = about if isinstance(about, dict) else {}
    count = about.pop("count", None)
    about = {key: str(value) for key, value in about.items()}
    if about.get("crop") == "centre":  # as version 0.1 wrote it
        about["crop"] = "center"
    return Statistics(mean_F, covariance_FF, count if isinstance(count, int) and count > 0 else None, about)


def check_comparable(wanted: Mapping[str, str], features: int, stored: Statistics, *, where: str) -> list[str]:
    """Notes on what is not known of `stored`, read from `where`.

    wanted: values of COMMON. features: length of a vector.

    Raises:
      UserError: another network, other weights, resize, crop, side or blur, or another number of features.
    """
    if len(stored.mean_F) != features:
        raise UserError(
            f"expected statistics of {features} features in {where}, got {len(stored.mean_F)}: "
            "they are of another network"
        )
    notes = []
    for key in COMMON:
        if key not in stored.about:
            notes.append(f"{where} does not say its {key}")
        elif key in wanted and wanted[key] != stored.about[key]:
            raise UserError(
                f"expected {key} {wanted[key]} in {where}, got {stored.about[key]}: compute both sets in the same way"
            )
    return notes
