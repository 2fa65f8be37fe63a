"""Checkpoints of a run (Orbax) and exported models (safetensors): the only place that knows either format.

    WORKDIR/config.json  checkpoints/STEP/{state,data}   a run: whole training state and the position in the data
    DIR/config.json      params.safetensors              a model: parameters alone, flat keys joined by '/'

Both are written aside and appear whole or not at all; what a crash left half-written is never read. Arrays are plain
nested dicts; which mesh they lie on is said by whoever restores them, so a run may go on on another number of devices.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from dalle_jax.errors import UserError

CONFIG, PARAMS, CHECKPOINTS = "config.json", "params.safetensors", "checkpoints"


class Checkpoints:
    """The checkpoints of one run, for its training loop. Saving happens in the background."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        """keep: how many of the newest stay.

        Raises:
          UserError: the workdir cannot be written.
        """
        self._folder = (pathlib.Path(workdir) / CHECKPOINTS).absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _remove_incomplete(self._folder)
        except OSError as error:
            raise UserError(
                f"expected a workdir to write to, got {workdir} ({error.strerror}): choose another"
            ) from error
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return max(complete_steps(self._folder.parent), default=None)

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Starts writing; the arrays may be donated as soon as this returns. Does nothing if the step is saved."""
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data)))
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract` (ShapeDtypeStruct with shardings) says, and the position in the data.

        Raises:
          UserError: the checkpoint is damaged or holds other arrays.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"expected a checkpoint of this run in {self._folder / str(step)}, but it cannot be read "
                f"({_first_line(error)}): delete that folder to go on from the checkpoint before it"
            ) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def complete_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints that were written to the end, ascending."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and _is_complete(path))


def _is_complete(path: pathlib.Path) -> bool:
    """Orbax dates its metadata when all arrays are on disk, whatever it does to make the folder appear."""
    try:
        return bool(json.loads((path / "_CHECKPOINT_METADATA").read_text()).get("commit_timestamp_nsecs"))
    except (OSError, ValueError):
        return False


def _remove_incomplete(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.name.isdigit() and not _is_complete(path):
            shutil.rmtree(path)


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
        write_file(folder / PARAMS, safetensors.numpy.save(flat))
        write_file(folder / CONFIG, (json.dumps(dict(config), indent=2) + "\n").encode())
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
            f"expected the parameters of a model in {folder / PARAMS}, got {_first_line(error)}: export it again"
        ) from error
    return config, _nested({tuple(key.split("/")): value for key, value in flat.items()})


def load_model_dir(folder: str | os.PathLike, *, name: str | None = None) -> tuple[dict[str, Any], Any]:
    """Config and parameters of an exported model or of a run's newest complete checkpoint (its moving average).

    name: the model that is wanted, 'dvae' or 'transformer'; None takes any. The config has 'name' and 'model'.

    Raises:
      UserError: nothing there, no complete checkpoint yet, damaged files, or another model.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    if name is not None and config["name"] != name:
        raise UserError(f"expected a {name} in {folder}, got a {config['name']}: give the folder of a {name}")
    if (folder / PARAMS).exists():
        return load_params(folder)
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"expected a trained model in {folder}, got a run without a checkpoint: train it first")
    return config, _load_average(folder / CHECKPOINTS / str(steps[-1]))


def _load_average(path: pathlib.Path) -> Any:
    """Only the moving average out of a checkpoint, as numpy arrays."""
    state = (path / "state").absolute()
    try:
        with _without_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            ema = _plain(reader.metadata(state).item_metadata.tree)["ema"]
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), ema)
            wanted = ocp.args.PyTreeRestore(item={"ema": ema}, restore_args={"ema": restore}, partial_restore=True)
            return reader.restore(state, args=wanted)["ema"]
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(
            f"expected a checkpoint in {path}, but it cannot be read ({_first_line(error)}): "
            "delete that folder to use the checkpoint before it"
        ) from error


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
        raise UserError(f"expected json in {path}, got {_first_line(error)}: mend or delete it") from error
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


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Write a file that is the old one or the new one at any moment, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
