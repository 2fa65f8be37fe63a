"""The sha256 of every file of a folder, and of a tree of arrays, whatever mesh it lies on.

A manifest inside a checkpoint tells one that was cut or bit-flipped on disk from a good one before any number of it is
used: Orbax checks some of what it writes, not all.
"""

import concurrent.futures
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.errors import UserError

MANIFEST = "sha256.json"
THREADS = 8  # hashing releases the interpreter, so files are hashed side by side
BLOCK = 1 << 22  # bytes read at a time


def write_manifest(folder: epath.Path, *, leave_out: Collection[str] = ()) -> None:
    """Write size and sha256 of every file below `folder` into its sha256.json.

    What a folder below has in a sha256.json of its own is taken from there, so that each process reads what it wrote.
    leave_out: names of files at the top of the folder that may still change.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    names, listed = [name for name in sorted(_files(folder)) if name not in (MANIFEST, *leave_out)], {}
    for part in (name.removesuffix(MANIFEST) for name in names if name.endswith(f"/{MANIFEST}")):
        listed |= {part + name: entry for name, entry in json.loads((folder / part / MANIFEST).read_text()).items()}
    names = [name for name in names if name not in listed]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _hash(folder / name), names))
    listed |= {name: {"bytes": size, "sha256": digest} for name, (size, digest) in zip(names, found, strict=True)}
    (folder / MANIFEST).write_text(json.dumps(listed, indent=1))


def damage(folder: epath.Path, *, share: slice = slice(None)) -> str | None:
    """The damage to the files of `folder` by its manifest, in a few words; None if there is none, or no manifest.

    share: which of the files to check, ordered by size, so that several processes share the reading.

    Raises:
      UserError: this user may not read a file, which is no damage.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(path.read_text()).items()}
    except PermissionError as error:
        raise forbidden(error) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    by_size = sorted(listed, key=lambda name: (listed[name][0], name))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for problem in pool.map(lambda name: _difference(folder / name, name, *listed[name]), by_size[share]):
            if problem:
                return problem
    return None


def forbidden(error: PermissionError) -> UserError:
    """The error for a file of a checkpoint that this user may not read."""
    return UserError(f"expected to read {error.filename}, got {error.strerror}: allow it, and give the command again")


def size(folder: epath.Path) -> int:
    """Bytes of all files below a folder."""
    return sum((folder / name).stat().length for name in _files(folder))


def of_tree(tree: Any) -> str:
    """sha256 of a tree of arrays: the names, types, shapes and bits of its leaves in the order of their names.

    tree: nested mappings and sequences of numpy arrays or of jax arrays that are wholly addressable.
    """
    total = hashlib.sha256()
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    named = [(("/" if path else "") + keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    for name, leaf in sorted(named, key=lambda item: item[0]):
        array = np.asarray(leaf)
        total.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def of_parts(parts: Mapping[str, str]) -> str:
    """One sha256 for several named ones."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def of_model(config: Mapping[str, Any], params: Any) -> str:
    """One sha256 for a model: its config, plain json with every default in it, and its parameters."""
    return of_parts({"config": json.dumps(dict(config), sort_keys=True), "params": of_tree(params)})


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _hash(path: epath.Path) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


def _difference(path: epath.Path, name: str, size: int, digest: str) -> str | None:
    try:
        found = _hash(path)
    except PermissionError as error:
        raise forbidden(error) from error
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found[0] != size:
        return f"{name} has {found[0]} bytes instead of {size}"
    return None if found[1] == digest else f"{name} is not what was written"
