"""A folder that holds a model: what `dalle-jax export` writes, or the workdir of a run with its newest checkpoint.

    DIR/config.json   params.safetensors           an exported model: parameters alone, keys joined by '/'
    DIR/config.json   checkpoints/STEP/            a run: `checkpoint/reader.py`
    DIR/frozen.json   DIR/ROLE/                    of either: the models that it needs, by role, and their sha256

`load` returns its config, definition and parameters, which fit each other.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from dalle_jax import files
from dalle_jax.checkpoint import digest, reader
from dalle_jax.errors import UserError, first_line, writing_to
from dalle_jax.models import Model, Params, build, image_tokenizer

CONFIG, PARAMS = "config.json", "params.safetensors"
FROZEN = "frozen.json"  # role -> sha256 of the frozen model that the folder's own was trained with
# What may be frozen -> names of models that can be it.
ROLES: dict[str, tuple[str, ...]] = {"image_tokenizer": image_tokenizer.NAMES, "lpips": ("lpips",)}
TRAINING_ROLES = ("lpips",)  # of frozen models that a loss reads, and the trained model does without
TRAINING_PART = "discriminator"  # of the parameters of a run: its adversary's, which the trained model does without
_OLD_FROZEN = {"image_tokenizer": ("dvae", "dvae.sha256")}  # folder and file of version 0.1


@dataclasses.dataclass(frozen=True)
class ModelDir:
    """A loaded model. config: of the folder, with 'name' and 'model'. model: its definition. params: numpy arrays,
    with the names and shapes that the definition has."""

    config: dict[str, Any]
    model: Model
    params: Params

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of sizes and parameters; reads all of them."""
        return digest.of_model(dataclasses.asdict(self.model.config), self.params)


def load(
    folder: str | os.PathLike,
    name: str | Collection[str] | None = None,
    *,
    step: int | None = None,
    average: bool = True,
) -> ModelDir:
    """The model of a folder; of a run that of its newest complete checkpoint, or of the one of `step`.

    name: the model that is wanted, e.g. 'clip', or several to take one of; None takes any. average: of a run the moving
    average of the parameters, else the parameters themselves.

    Raises:
      UserError: nothing there, no complete checkpoint yet, damaged files, impossible sizes, parameters that do not
        belong to the config, or another model.
    """
    config = read_config(folder)
    names = [name] if isinstance(name, str) else name
    if names is not None and config["name"] not in names:
        wanted = " or ".join(names)
        raise UserError(f"expected a {wanted} in {folder}, got a {config['name']}: give the folder of a {wanted}")
    try:
        model = build(config["name"], config["model"])
    except (TypeError, ValueError) as error:
        raise UserError(
            f"expected a possible {config['name']} in {folder}, got one where {error}: restore its {CONFIG}"
        ) from error
    params = read_params(folder, step=step, average=average)
    params = {key: part for key, part in params.items() if key != TRAINING_PART}
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
    if step is not None:
        raise UserError(
            f"expected a run to take a checkpoint of, got the model in {folder}, which has none: give no step"
        )
    try:
        flat = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"expected the parameters of a model in {path}, got {first_line(error)}: export it again"
        ) from error
    return unflatten_dict(flat, sep="/")


def save(folder: str | os.PathLike, config: Mapping[str, Any], params: Params) -> None:
    """Write an exported model. config: plain json with at least 'name' and 'model'; params: nested dict of arrays.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    flat = {path: np.ascontiguousarray(value) for path, value in flatten_dict(params, sep="/").items()}
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # without it, the folder is no model
        with files.replacing(folder / PARAMS) as aside:
            safetensors.numpy.save_file(flat, aside)
        files.write(folder / CONFIG, json.dumps(dict(config), indent=2) + "\n")


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


def checkpoint_dir(config: Mapping[str, Any]) -> str | None:
    """Where the checkpoints of the run with this config.json lie; None: in its workdir."""
    return config.get("run", config).get("checkpoint_dir") or None  # version 0.1 has it at the top, '' for none


def check_params(params: Any, abstract: Any, *, where: str) -> None:
    """Raises UserError if parameters have not the names and shapes that the model of their config has."""
    found, wanted = (
        {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()} for tree in (params, abstract)
    )
    for path in sorted({**found, **wanted}):
        if found.get(path) != wanted.get(path):
            raise UserError(
                f"expected parameter {path} of shape {wanted.get(path)} in {where}, got {found.get(path)}: "
                "the parameters do not belong to this config"
            )


def has_frozen(folder: str | os.PathLike, role: str) -> bool:
    """Whether a workdir or an exported model holds a copy of the frozen model of this role."""
    return (_frozen_dir(folder, role) / CONFIG).exists()


def load_frozen(folder: str | os.PathLike, role: str) -> ModelDir:
    """The frozen model of a role that lies in a workdir or an exported model, e.g. 'image_tokenizer'.

    Raises:
      UserError: it is missing, damaged, or another one than the model in the folder was trained with.
    """
    folder, found = pathlib.Path(folder), load(_frozen_dir(folder, role), ROLES[role])
    old_sha256 = folder / _old_names(role)[1]
    if (folder / FROZEN).exists():
        try:
            trained_with = json.loads((folder / FROZEN).read_text()).get(role)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"expected the sha256 of frozen models in {folder / FROZEN}, got {first_line(error)}: restore that file"
            ) from error
    else:
        trained_with = old_sha256.read_text().strip() if old_sha256.exists() else None
    if trained_with not in (None, found.digest):
        raise UserError(
            f"expected the {role} that the model in {folder} was trained with (sha256 {trained_with[:12]}), got "
            f"another ({found.digest[:12]}): put that one back into its folder"
        )
    return found


def _old_names(role: str) -> tuple[str, str]:
    """Names of a frozen model's folder and of its digest's file in version 0.1; those of today for newer roles."""
    return _OLD_FROZEN.get(role, (role, f"{role}.sha256"))


def _frozen_dir(folder: str | os.PathLike, role: str) -> pathlib.Path:
    """Where a frozen model lies, or lay in version 0.1."""
    place, old = pathlib.Path(folder) / role, pathlib.Path(folder) / _old_names(role)[0]
    return old if (old / CONFIG).exists() and not (place / CONFIG).exists() else place


def save_frozen(folder: str | os.PathLike, frozen: Mapping[str, ModelDir]) -> None:
    """Copy models that a run leaves as they are into its workdir, by role.

    Raises:
      UserError, OSError: the folder cannot be written.
    """
    digests = {role: found.digest for role, found in frozen.items()}
    files.write(pathlib.Path(folder) / FROZEN, json.dumps(digests, indent=1) + "\n")
    for role, found in frozen.items():
        save(pathlib.Path(folder) / role, {key: found.config[key] for key in ("name", "model")}, found.params)
