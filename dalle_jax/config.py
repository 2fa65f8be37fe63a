"""Configs: from `configs/transformer.py:demo` and `--config.key=value` to one complete, locked ConfigDict.

A config is a Python file with `get_config(variant)` that returns every key with its default; overrides may change
values but never add keys. Also knows which keys a run may change when it goes on in the same workdir. Knows nothing
of what the keys mean.
"""

import difflib
import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dalle_jax.errors import UserError

PACKAGE = "dalle_jax.configs"
OVERRIDE = "--config."

# A run that goes on in its workdir may change these, by exact key or by 'prefix.'. None of them changes what an update
# computes, but for `steps` where a schedule ends with it, `mesh` and `model.attention`, which change the order of sums,
# and with it how gradients are cut that are compressed. `data.lanes` is
# checked against the checkpoint, which knows its own.
FREE_KEYS = (
    "steps",
    "log_every",
    "validate_every",
    "validation_batches",
    "picture_every",
    "evaluate.",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every_hours",
    "checkpoint_dir",
    "rollback_after",
    "check_replicas_every",
    "mesh.",
    "model.attention",
    "processes.",
    "data.lanes",
    "storage.offload_ema",
    "data.threads",
    "data.prefetch_batches",
    "data.max_bad_share",
)


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `FILE.py:VARIANT` with overrides like `--config.model.width=128` applied, locked.

    A relative file is looked for in the current directory, then beside the package.

    Raises:
      UserError: no such file or variant, an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    path, _, variant = spec.partition(":")
    module = _module(_find(path))
    variants = getattr(module, "VARIANTS", None)
    if variant and variants is not None and variant not in variants:
        raise UserError(f"expected one of {', '.join(variants)} after the colon of --config {spec}, got {variant!r}")
    config = module.get_config(variant) if variant else module.get_config()
    return _override(config, overrides)


def _find(name: str) -> pathlib.Path:
    root = pathlib.Path(__file__).parent
    for folder in (pathlib.Path(), root, root.parent):
        if (path := folder / name).is_file():
            return path.resolve()
    known = sorted(p.name for p in _package_dir().glob("*.py") if p.stem not in ("__init__", "base"))
    raise UserError(
        f"expected a config file, got {name!r} that does not exist: try configs/{' or configs/'.join(known)}"
    )


def _package_dir() -> pathlib.Path:
    """Installed, the configs lie inside the package; in a clone, beside it."""
    root = pathlib.Path(__file__).parent
    return root / "configs" if (root / "configs").is_dir() else root.parent / "configs"


def _module(path: pathlib.Path) -> ModuleType:
    """Import a config file. `from dalle_jax.configs import base` works in it, wherever it lies."""
    folder = _package_dir().resolve()
    if PACKAGE not in sys.modules:
        _import_file(PACKAGE, folder / "__init__.py", package_dir=folder)
    if path.parent == folder:
        return importlib.import_module(f"{PACKAGE}.{path.stem}")
    return _import_file(f"{PACKAGE}_{path.stem}", path)


def _import_file(name: str, path: pathlib.Path, *, package_dir: pathlib.Path | None = None) -> ModuleType:
    locations = None if package_dir is None else [str(package_dir)]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if package_dir is None and not hasattr(module, "get_config"):
        raise UserError(f"expected a config file with a function get_config, got {path} without one")
    return module


def _override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    known = flatten(config)
    for word in overrides:
        key, equals, _ = word.removeprefix(OVERRIDE).partition("=")
        if not word.startswith(OVERRIDE) or not equals:
            raise UserError(f"expected {OVERRIDE}key=value, got {word!r}: join key and value with =")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown config key {key!r}: the nearest valid one is {near!r}")
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *overrides])
    try:
        values(["", *overrides])
    except flags.Error as error:
        raise UserError(f"a config value has the wrong type or form: {error}") from None
    return holder.value.lock()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.width': 128, ...}; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(json.loads(text)).lock()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in a, value in b) where the two differ; a missing key counts as None."""
    flat_a, flat_b = flatten(a), flatten(b)
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in {**flat_a, **flat_b}}
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y}


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str) -> None:
    """Raises UserError with the differing keys if `new` is not the run that `old` began, FREE_KEYS left aside."""
    changed = {
        key: values
        for key, values in differences(old, new).items()
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)
    }
    if changed:
        listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in sorted(changed.items()))
        raise UserError(f"{where} belongs to another config ({listed}): use these values again or another --workdir")
