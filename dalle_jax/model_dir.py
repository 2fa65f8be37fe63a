"""A folder that holds a model: what `dalle-jax export` writes, or the workdir of a run with its newest checkpoint.

    DIR/config.json   params.safetensors     an exported model: parameters alone, keys joined by '/'
    DIR/config.json   checkpoints/STEP/      a run: `checkpoint/reader.py`

`load` returns its config, definition and parameters, which fit each other.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from dalle_jax import files
from dalle_jax.checkpoint import digest, reader
from dalle_jax.errors import UserError, first_line
from dalle_jax.models import Model, Params, build

CONFIG, PARAMS = "config.json", "params.safetensors"
DVAE_SHA256 = "dvae.sha256"  # of the dVAE that a transformer was trained with


@dataclasses.dataclass(frozen=True)
class ModelDir:
    """What `load` found. config: of the folder, with 'name' and 'model'. model: its definition. params: numpy arrays,
    with the names and shapes that the definition has."""

    config: dict[str, Any]
    model: Model
    params: Params

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of sizes and parameters; reads all of them."""
        return digest.of_model(dataclasses.asdict(self.model.config), self.params)


def load(
    folder: str | os.PathLike, name: str | None = None, *, step: int | None = None, average: bool = True
) -> ModelDir:
    """The model of a folder; of a run that of its newest complete checkpoint, or of the one of `step`.

    name: the kind that is wanted, e.g. 'dvae'; None takes any. average: of a run the moving average of the parameters,
    else the parameters themselves.

    Raises:
      UserError: nothing there, no complete checkpoint yet, damaged files, impossible sizes, parameters that do not
        belong to the config, or another model.
    """
    config = read_config(folder)
    if name is not None and config["name"] != name:
        raise UserError(f"expected a {name} in {folder}, got a {config['name']}: give the folder of a {name}")
    try:
        model = build(config["name"], config["model"])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"expected a possible {config['name']} in {folder}, got one where {error}: restore its {CONFIG}"
        ) from error
    params = read_params(folder, step=step, average=average)
    check_params(params, model.abstract, where=os.fspath(folder))
    return ModelDir(config, model, params)


def read_params(folder: str | os.PathLike, *, step: int | None = None, average: bool = True) -> Params:
    """The parameters of a folder as `load` finds them, without a look at what model they belong to.

    Raises:
      UserError: nothing there, no complete checkpoint yet, or damaged files.
    """
    path = pathlib.Path(folder) / PARAMS
    if not path.exists():
        _, checkpoint = reader.checkpoint_path(folder, checkpoint_dir(read_config(folder)), step=step)
        return reader.read(checkpoint, "ema" if average else "params")
    try:
        flat = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"expected the parameters of a model in {path}, got {first_line(error)}: export it again"
        ) from error
    return _nested({tuple(key.split("/")): value for key, value in flat.items()})


def save(folder: str | os.PathLike, config: Mapping[str, Any], params: Params) -> None:
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
        files.write(folder / CONFIG, json.dumps(dict(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"expected a folder to write to, got {folder} ({error.strerror}): choose another") from error


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


def checkpoint_dir(config: Mapping[str, Any]) -> str:
    """Where the checkpoints of the run with this config.json lie; '': in its workdir."""
    return config.get("checkpoint_dir", "")


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
