"""Checkpoints of a run as Orbax writes them: the only place that knows the format.

    WORKDIR/checkpoints/STEP/{state,data,sha256.json}   training state and position in the data

A checkpoint is written aside and appears whole or not at all; what a crash left half-written is never read, and what a
disk has changed since is noticed by its sha256. Arrays are plain nested dicts; which mesh they lie on is said by
whoever restores them, so a run may go on on another number of devices. The checkpoints of a run may lie elsewhere, on
gs:// too: the config's `checkpoint_dir` names the place.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax.checkpoint import digest
from dalle_jax.errors import UserError

CHECKPOINTS = "checkpoints"
COMMITTED = "_CHECKPOINT_METADATA"  # Orbax dates it at the very end, so the manifest leaves it out


def complete_steps(workdir: str | os.PathLike, folder: str = "") -> list[int]:
    """Steps of the checkpoints that were written to the end, ascending. folder: the config's `checkpoint_dir`."""
    return steps_in(checkpoint_folder(workdir, folder))


def checkpoint_path(workdir: str | os.PathLike, folder: str = "", *, step: int | None = None) -> tuple[int, epath.Path]:
    """Step and folder of a run's newest complete checkpoint, or of the one of `step`.

    folder: the config's `checkpoint_dir`.

    Raises:
      UserError: no complete checkpoint yet, or none of that step.
    """
    place = checkpoint_folder(workdir, folder)
    steps = steps_in(place)
    if not steps:
        raise UserError(f"expected a trained model in {workdir}, got a run without a checkpoint: train it first")
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(f"expected a checkpoint of update {step} in {place}, got those of {listed}: take one of them")
    step = steps[-1] if step is None else step
    return step, place / str(step)


def checkpoint_folder(workdir: str | os.PathLike, folder: str) -> epath.Path:
    """Where the checkpoints of a run lie; absolute, as Orbax wants it."""
    place = epath.Path(folder or epath.Path(workdir) / CHECKPOINTS)
    return place if is_remote(place) else epath.Path(os.path.abspath(place))


def is_remote(path: epath.Path) -> bool:
    """On an object store, where nothing can be renamed at no cost."""
    return "://" in os.fspath(path)


def steps_in(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and is_complete(path))


def is_complete(path: epath.Path) -> bool:
    """Orbax dates its metadata when all arrays are on disk, whatever it does to make the folder appear."""
    try:
        return bool(json.loads((path / COMMITTED).read_text()).get("commit_timestamp_nsecs"))
    except (OSError, ValueError, AttributeError):
        return False


def data_position(path: epath.Path) -> dict[str, Any]:
    """The position in the data that a checkpoint holds; plain json.

    Raises:
      UserError: the checkpoint is damaged.
    """
    try:
        with _without_warnings(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(path / "data")
    except Exception as error:  # Orbax raises many kinds
        raise _unreadable(path, error) from error


def describe(path: epath.Path) -> dict[str, Any]:
    """step, bytes, written (ISO, UTC) and damage (None: the files are what was written) of a complete checkpoint."""
    when = json.loads((path / COMMITTED).read_text())["commit_timestamp_nsecs"] / 1e9
    return {
        "step": int(path.name),
        "bytes": digest.size(path),
        "written": datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(),
        "damage": digest.damage(path),
    }


def state_digests(path: epath.Path) -> dict[str, str]:
    """sha256 of each part of the training state in a checkpoint, independent of mesh and layout; 'state' is the whole.

    Holds one part at a time in memory; the largest is the optimizer's.

    Raises:
      UserError: the checkpoint is damaged.
    """
    parts = {key: digest.of_tree(read(path, key)) for key in sorted(_parts(path))}
    return parts | {"state": digest.of_parts(parts)}


def read(path: epath.Path, key: str) -> Any:
    """One part of the state in a checkpoint, 'params' or 'ema' for example, as numpy arrays."""
    part = _plain(_parts(path)[key])
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    wanted = ocp.args.PyTreeRestore(item={key: part}, restore_args={key: restore}, partial_restore=True)
    try:
        with _reading() as reader:
            return reader.restore(path / "state", args=wanted)[key]
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise _unreadable(path, error) from error


def _parts(path: epath.Path) -> dict[str, Any]:
    """The tree of arrays in a checkpoint, without their values."""
    try:
        with _reading() as reader:
            return dict(reader.metadata(path / "state").item_metadata.tree)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def _reading():
    with _without_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        yield reader


def _unreadable(path: epath.Path, error: Exception) -> UserError:
    return UserError(
        f"expected a checkpoint in {path}, but it cannot be read ({first_line(error)}): "
        "delete that folder to use the checkpoint before it"
    )


@contextlib.contextmanager
def _without_warnings():
    """Orbax warns that one item of a checkpoint, read alone, lacks the metadata that lies one folder up."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


def _plain(tree: Any) -> Any:
    """Nested mappings as dicts; leaves as they are."""
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def first_line(error: Exception) -> str:
    """What an exception of a library says, short enough for a sentence."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
