"""Config files: from `configs/transformer.py:demo` and `--config.key=value` to one complete, locked ConfigDict.

A config is a Python file with `get_config(variant)` that returns every key with its default; overrides may change
values but never add keys. Knows of no key what it means.
"""

import contextlib
import difflib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import dalle_jax
from dalle_jax.errors import UserError, first_line

OVERRIDE = "--config."
# Keys of version 0.1, or what they begin with -> what they are called now.
OLD_KEYS = {
    "dvae": "frozen.image_tokenizer",
    "precision": "model.precision",
    "storage.offload_average": "run.offload_ema",
    "data.train": "run.data.train",
    "data.validation": "run.data.validation",
    "data.lanes": "run.data.shards",
    "data.threads": "run.data.threads",
    "data.prefetch_batches": "run.data.prefetch_batches",
    "data.max_bad_share": "run.data.max_bad_share",
}
OLD_KEYS |= {
    key: f"run.{key}"
    for key in (
        "steps", "mesh", "processes", "evaluate", "log_every", "validate_every", "validation_batches", "picture_every",
        "checkpoint_every", "keep_checkpoints", "keep_every_hours", "checkpoint_dir", "rollback_after",
        "check_replicas_every",
    )
}  # fmt: skip


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `FILE.py:VARIANT` with overrides like `--config.model.width=128` applied, locked.

    A relative file is looked for in the current directory, then beside the package. The value None, or nothing after
    the =, is None.

    Raises:
      UserError: no such file or variant, an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    path, _, variant = spec.partition(":")
    module = _module(_find(path))
    variants = getattr(module, "VARIANTS", None)
    if variant and variants is not None and variant not in variants:
        raise UserError(f"expected one of {', '.join(variants)} after the colon of --config {spec}, got {variant!r}")
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"expected a config file with a function get_config, got {path} without one: add it")
    try:
        arguments = inspect.signature(get_config).bind(*[variant] * bool(variant)).args
    except TypeError as error:
        raise UserError(f"expected --config FILE.py:VARIANT that get_config takes, got {spec} ({error})") from error
    with _run_by_python(path):
        config = get_config(*arguments)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"expected get_config of {path} to return a ConfigDict, got a {type(config).__name__}: start from a config "
            "of dalle_jax.configs, or wrap it as ml_collections.ConfigDict(...)"
        )
    return _override(config, overrides)


def variants(file: str) -> tuple[str, ...]:
    """The variants of a config file such as configs/dvae.py.

    Raises:
      UserError: no such file.
    """
    return tuple(_module(_find(file)).VARIANTS)


def _configs() -> pathlib.Path:
    """The folder of the configs: installed it lies inside the package, in a clone beside it."""
    package = pathlib.Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def _find(name: str) -> pathlib.Path:
    for folder in (pathlib.Path(), _configs().parent):
        if (path := folder / name).is_file() and path.suffix == ".py":
            return path.resolve()
    known = sorted(f"configs/{p.name}" for p in _configs().glob("*.py") if p.stem not in ("__init__", "base"))
    raise UserError(f"expected a Python file with a config, got {name!r}, which is none: try {' or '.join(known)}")


def _module(path: pathlib.Path) -> ModuleType:
    """Import a config file; `from dalle_jax.configs.base import fields` works in it, wherever the configs lie."""
    if (parent := str(_configs().parent)) not in dalle_jax.__path__:
        dalle_jax.__path__.append(parent)
    name = f"dalle_jax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # every .py file has them
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    with _run_by_python(str(path)):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _run_by_python(path: str) -> Iterator[None]:
    """A block that runs a config file, whose mistakes are those of its author."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise UserError(
            f"expected a config that Python can run, got {type(error).__name__} in line {line} of {path} "
            f"({first_line(error)}): mend the file"
        ) from error


def _override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    known, given = flatten(config), {}
    for word in overrides:
        key, equals, value = word.removeprefix(OVERRIDE).partition("=")
        if not word.startswith(OVERRIDE) or not equals:
            raise UserError(f"expected {OVERRIDE}key=value, got {word!r}: join key and value with =")
        if key not in known:
            raise UserError(f"unknown config key {key!r}: {advice(key, known)}")
        given[key] = value
    nothing = {key: None for key, value in given.items() if value in ("None", "")}
    words = [f"{OVERRIDE}{key}={value}" for key, value in given.items() if key not in nothing]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *words])
    try:
        values(["", *words])
    except flags.Error as error:
        raise UserError(f"a config value has the wrong type or form: {first_line(error)}") from None
    holder.value.update_from_flattened_dict(nothing)
    return holder.value.lock()


def advice(key: str, known: Collection[str]) -> str:
    """Advice on what to write instead of an unknown key."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        if new := OLD_KEYS.get(".".join(parts[:count])):
            return f"it is called {'.'.join([new, *parts[count:]])!r} since version 0.2"
    return f"the nearest valid one is {max(known, key=lambda other: _likeness(key, other))!r}"


def _likeness(key: str, other: str) -> float:
    """The likeness of two keys, the last part counted twice, for which its initials will do: lr, wd."""
    last, of_other = key.rpartition(".")[2], other.rpartition(".")[2]
    initials = "".join(word[:1] for word in of_other.split("_"))
    ratios = [difflib.SequenceMatcher(a=a, b=b).ratio() for a, b in ((key, other), (last, of_other))]
    return ratios[0] + (1.0 if last == initials else ratios[1])


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.width': 128, ...}; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in a, value in b) where the two differ; a missing key counts as None."""
    flat_a, flat_b = flatten(a), flatten(b)
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in {**flat_a, **flat_b}}
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y}
