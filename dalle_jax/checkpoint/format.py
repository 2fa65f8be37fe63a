"""Checkpoints of a run (Orbax) and exported models (safetensors): the only place that knows either format.

    WORKDIR/config.json  checkpoints/STEP/{state,data,sha256.json}   a run: training state and position in the data
    WORKDIR/dvae.sha256                                              of the dVAE whose codes a transformer speaks
    DIR/config.json      params.safetensors                          a model: parameters alone, keys joined by '/'

Both are written aside and appear whole or not at all; what a crash left half-written is never read, and what a disk
has changed since is noticed by its sha256. Arrays are plain nested dicts; which mesh they lie on is said by whoever
restores them, so a run may go on on another number of devices. The checkpoints of a run may lie elsewhere, on gs://
too: the config's `checkpoint_dir` names the place.
"""

import contextlib
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath

from dalle_jax import files
from dalle_jax.checkpoint import digest
from dalle_jax.errors import UserError

CONFIG, PARAMS, CHECKPOINTS = "config.json", "params.safetensors", "checkpoints"
DVAE_SHA256 = "dvae.sha256"
COMMITTED = "_CHECKPOINT_METADATA"  # Orbax dates it at the very end, so the manifest leaves it out


def complete_steps(workdir: str | os.PathLike, folder: str = "") -> list[int]:
    """Steps of the checkpoints that were written to the end, ascending. folder: the config's `checkpoint_dir`."""
    return steps_in(checkpoint_folder(workdir, folder))


def checkpoint_path(workdir: str | os.PathLike, step: int | None = None) -> tuple[int, epath.Path]:
    """Step and folder of a run's newest complete checkpoint, or of the one of `step`.

    Raises:
      UserError: no run there, no complete checkpoint yet, or none of that step.
    """
    folder = checkpoint_folder(workdir, read_config(workdir).get("checkpoint_dir", ""))
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"expected a trained model in {workdir}, got a run without a checkpoint: train it first")
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps))
        raise UserError(f"expected a checkpoint of update {step} in {folder}, got those of {listed}: take one of them")
    step = steps[-1] if step is None else step
    return step, folder / str(step)


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


def save_params(folder: str | os.PathLike, config: Mapping[str, Any], params: Any) -> None:
    """Write an exported model. config: plain json with at least 'name' and 'model'; params: nested dict of arrays.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    flat = {"/".join(path): np.ascontiguousarray(value) for path, value in _flat(params).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # without it, the folder is no model
        files.write(folder / PARAMS, safetensors.numpy.save(flat))
        files.write(folder / CONFIG, (json.dumps(dict(config), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"expected a folder to write to, got {folder} ({error.strerror}): choose another") from error


def load_params(folder: str | os.PathLike) -> tuple[dict[str, Any], Any]:
    """Config and parameters (nested dict of numpy arrays) of an exported model.

    Raises:
      UserError: nothing there, or not an exported model.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    try:
        flat = safetensors.numpy.load_file(folder / PARAMS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"expected the parameters of a model in {folder / PARAMS}, got {first_line(error)}: export it again"
        ) from error
    return config, _nested({tuple(key.split("/")): value for key, value in flat.items()})


def load_model_dir(
    folder: str | os.PathLike, *, name: str | None = None, step: int | None = None, average: bool = True
) -> tuple[dict[str, Any], Any]:
    """Config and parameters of an exported model or of a complete checkpoint of a run, the newest or that of `step`.

    name: the model that is wanted, 'dvae', 'transformer' or 'clip'; None takes any. average: of a run the moving
    average of the parameters, else the parameters themselves. The config has 'name' and 'model'.

    Raises:
      UserError: nothing there, no complete checkpoint yet, damaged files, or another model.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    if name is not None and config["name"] != name:
        raise UserError(f"expected a {name} in {folder}, got a {config['name']}: give the folder of a {name}")
    if (folder / PARAMS).exists():
        return load_params(folder)
    return config, _read(checkpoint_path(folder, step)[1], "ema" if average else "params")


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
    parts = {key: digest.of_tree(_read(path, key)) for key in sorted(_parts(path))}
    return parts | {"state": digest.of_parts(parts)}


def _parts(path: epath.Path) -> dict[str, Any]:
    """The tree of arrays in a checkpoint, without their values."""
    try:
        with _reading() as reader:
            return dict(reader.metadata(path / "state").item_metadata.tree)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise _unreadable(path, error) from error


def _read(path: epath.Path, key: str) -> Any:
    """One part of the state in a checkpoint, as numpy arrays."""
    part = _plain(_parts(path)[key])
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    wanted = ocp.args.PyTreeRestore(item={key: part}, restore_args={key: restore}, partial_restore=True)
    try:
        with _reading() as reader:
            return reader.restore(path / "state", args=wanted)[key]
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


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a run or an exported model.

    Raises:
      UserError: no such folder or file, not json, or without 'name' and 'model'.
    """
    path = pathlib.Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"expected a model or a workdir, got {folder} without a readable {CONFIG}: check the path"
        ) from error
    except ValueError as error:
        raise UserError(f"expected json in {path}, got {first_line(error)}: mend or delete it") from error
    if not isinstance(config, dict) or "name" not in config or "model" not in config:
        raise UserError(f"expected the config of a model in {path}, got one without 'name' and 'model'")
    return config


def check_params(params: Any, abstract: Any, *, where: str) -> None:
    """Raises UserError if parameters have not the names and shapes that the model of their config has."""
    found = {path: tuple(value.shape) for path, value in _flat(params).items()}
    wanted = {path: tuple(value.shape) for path, value in _flat(abstract).items()}
    for path in sorted({**found, **wanted}):
        if found.get(path) != wanted.get(path):
            raise UserError(
                f"expected parameter {'/'.join(path)} of shape {wanted.get(path)} in {where}, got {found.get(path)}: "
                "the parameters do not belong to this config"
            )


def check_dvae(folder: str | os.PathLike, sha256: str) -> None:
    """Raises UserError if a transformer's folder says that it was trained on the codes of another dVAE than this one.

    sha256: `digest.of_model` of the dVAE. Folders of versions that did not write it say nothing.
    """
    path = pathlib.Path(folder) / DVAE_SHA256
    if path.exists() and (trained_with := path.read_text().strip()) != sha256:
        raise UserError(
            f"expected the dVAE whose codes the transformer in {folder} was trained on (sha256 {trained_with[:12]}), "
            f"got another ({sha256[:12]}): put that one back into its folder `dvae`"
        )


def _flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value})
    return flat


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _plain(tree: Any) -> Any:
    """Nested mappings as dicts; leaves as they are."""
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def first_line(error: Exception) -> str:
    """What an exception of a library says, short enough for a sentence."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
