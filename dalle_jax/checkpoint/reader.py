"""Finding and reading the checkpoints of a run, which `manager.py` writes; both with Orbax.

    WORKDIR/checkpoints/STEP/{state,data,sha256.json}   training state and position in the data

A checkpoint appears whole or not at all: what a crash left half-written is never read, and what a disk has changed
since is noticed by its sha256. Arrays are plain nested dicts. They lie on the mesh that whoever restores them asks
for, so a run may go on with another number of devices. The checkpoints may lie outside the workdir, on gs:// too.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax.checkpoint import digest
from dalle_jax.errors import UserError, first_line

CHECKPOINTS = "checkpoints"
COMMITTED = "_CHECKPOINT_METADATA"  # Orbax dates it at the very end, so the manifest leaves it out
JOINED = "state/manifest.ocdbt"  # what joins the parts `state/ocdbt.process_K` that the processes wrote


def complete_steps(workdir: str | os.PathLike, folder: str | None = None) -> list[int]:
    """Steps of a run's complete checkpoints, ascending. folder: the config's `checkpoint_dir`."""
    return steps_in(checkpoint_folder(workdir, folder))


def checkpoint_path(
    workdir: str | os.PathLike, folder: str | None = None, *, step: int | None = None
) -> tuple[int, epath.Path]:
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
        raise UserError(f"expected a checkpoint of step {step} in {place}, got those of {listed}: take one of them")
    step = steps[-1] if step is None else step
    return step, place / str(step)


def checkpoint_folder(workdir: str | os.PathLike, folder: str | None = None) -> epath.Path:
    """Where the checkpoints of a run lie; absolute, as Orbax requires. folder: the config's `checkpoint_dir`."""
    place = epath.Path(folder or epath.Path(workdir) / CHECKPOINTS)
    return place if is_remote(place) else epath.Path(os.path.abspath(place))


def is_remote(path: epath.Path) -> bool:
    """Whether a path is on an object store, where a folder cannot be renamed in one step."""
    return "://" in os.fspath(path)


def steps_in(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and is_complete(path))


def is_complete(path: epath.Path) -> bool:
    """Whether a checkpoint is complete: Orbax dates its metadata once all arrays are on disk.

    Raises:
      UserError: this user may not read it.
    """
    try:
        return bool(json.loads((path / COMMITTED).read_text()).get("commit_timestamp_nsecs"))
    except PermissionError as error:
        raise digest.forbidden(error) from error
    except (OSError, ValueError, AttributeError):
        return False


def data_position(path: epath.Path) -> dict[str, Any]:
    """The position in the data that a checkpoint holds; plain json.

    Raises:
      UserError: the checkpoint is damaged.
    """
    with _opened(path, ocp.JsonCheckpointHandler()) as opened:
        return opened.restore(path / "data")


def describe(path: epath.Path) -> dict[str, Any]:
    """A complete checkpoint as a dict: step, bytes, written (ISO, UTC), damage (None: undamaged)."""
    when = json.loads((path / COMMITTED).read_text())["commit_timestamp_nsecs"] / 1e9
    return {
        "step": int(path.name),
        "bytes": digest.size(path),
        "written": datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(),
        "damage": digest.damage(path),
    }


def state_digests(path: epath.Path) -> dict[str, str]:
    """The sha256 of each part of the training state in a checkpoint, whatever its mesh; 'state' is that of the whole.

    Holds one part at a time in memory; the largest is the optimizer's.

    Raises:
      UserError: the checkpoint is damaged.
    """
    parts = {key: digest.of_tree(read(path, key)) for key in sorted(_parts(path))}
    return parts | {"state": digest.of_parts(parts)}


def read(path: epath.Path, key: str) -> Any:
    """One part of the state in a checkpoint, for example 'params' or 'ema', as numpy arrays.

    Raises:
      UserError: the checkpoint is damaged.
    """
    part = _parts(path)[key]
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    wanted = ocp.args.PyTreeRestore(item={key: part}, restore_args={key: restore}, partial_restore=True)
    with _opened(path, ocp.PyTreeCheckpointHandler()) as opened:
        return opened.restore(path / "state", args=wanted)[key]


def unreadable(path: epath.Path, error: Exception) -> UserError:
    """The error for a checkpoint that Orbax cannot read. An exception of a library is no damage."""
    if problem := digest.damage(path):
        return UserError(
            f"expected an undamaged checkpoint in {path}, got one where {problem}: move that folder away to use the "
            "checkpoint before it"
        )
    if not (path / JOINED).exists():
        return UserError(
            f"expected {JOINED} in {path}, got a checkpoint whose parts were not joined: nothing of it is lost, and "
            'docs/faults.md says under "A path with brackets" how to join them'
        )
    return UserError(
        f"expected to read the checkpoint in {path}, got {first_line(error)}: its files are not damaged, so leave them "
        "as they are, and look for the cause in this installation or in the config"
    )


def _parts(path: epath.Path) -> Mapping[str, Any]:
    """The tree of arrays in a checkpoint, without their values."""
    with _opened(path, ocp.PyTreeCheckpointHandler()) as opened:
        return opened.metadata(path / "state").item_metadata.tree


@contextlib.contextmanager
def _opened(path: epath.Path, handler: ocp.CheckpointHandler) -> Iterator[ocp.Checkpointer]:
    """An Orbax reader. It warns that one item read alone lacks the metadata one folder up; we do not repeat that."""
    jax.devices()  # of which Orbax asks, too: without one the checkpoint is not to blame
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as opened:
            yield opened
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise unreadable(path, error) from error
    finally:
        absl.logging.set_verbosity(before)
