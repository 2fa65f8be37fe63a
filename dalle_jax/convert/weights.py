"""The first steps of every importer: find published arrays by name, check the names and shapes, rename and nest them.

Files are safetensors, PyTorch's or Flax's; an array is read when it is asked for. Knows nothing of any model.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from dalle_jax.convert import flax_files, safetensors_files, torch_files
from dalle_jax.convert.stored import Array, State, reading
from dalle_jax.errors import UserError
from dalle_jax.models import Params

INDEX = ".index.json"  # behind the name that the file would have if it were one
# In a folder the first of these that is there.
FILES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")


def read(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Array]:
    """The arrays of a file, of the shards of an index, or of a folder with either, each read when it is asked for.

    path: safetensors, a state dict of PyTorch, also within a checkpoint, Flax's msgpack (keys joined by dots), or an
    index in json. allow_pickle: whole modules of PyTorch too, whose files can run any code.

    Raises:
      UserError: not there, not readable, damaged, not agreeing with its index, or it would call something.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        names = [name for file in FILES for name in (file + INDEX, file)]
        path = next((f"{path}/{name}" for name in names if os.path.isfile(f"{path}/{name}")), path)
    if not os.path.isfile(path):
        what = f"is a folder without {', '.join(FILES)}" if os.path.isdir(path) else "does not exist"
        raise UserError(f"expected a file with a state dict, but {path} {what}: give the file")
    if path.endswith(INDEX):
        return _shards(path)
    with reading(path), open(path, "rb") as file:
        head = file.read(16)
    if (zipped := head.startswith(b"PK")) or re.match(rb"\x80[\x02-\x05]", head):
        return _module(path) if allow_pickle else torch_files.read(path, zipped=zipped)
    if head[8:9] == b"{":
        return safetensors_files.read(path)
    if re.match(rb"[\x81-\x8f\xde\xdf]", head):
        return flax_files.read(path)
    raise UserError(
        f"expected weights (safetensors, PyTorch's or Flax's) in {path}, got a file that begins with {head!r}: fetch "
        "it again"
    )


def _shards(index: str) -> dict[str, Array]:
    """The arrays of all files that an index names, which must say the same."""
    with reading(index):
        shard_of = json.loads(pathlib.Path(index).read_text())["weight_map"]
        shard_of = {name.replace("/", "."): pathlib.PurePath(file).name for name, file in shard_of.items()}
        if any(file.endswith(INDEX) for file in shard_of.values()):
            raise ValueError("an index among its shards")
    whole = pathlib.Path(index.removesuffix(INDEX))
    pattern = re.compile(rf"{re.escape(whole.stem)}(-\d+-of-\d+)?{re.escape(whole.suffix)}")
    files, beside = set(shard_of.values()), {path.name for path in whole.parent.iterdir()}
    check_names(
        dict.fromkeys(name for name in beside if name in files or pattern.fullmatch(name)),
        dict.fromkeys(files),
        what=f"the files that {index} names",
    )
    state: dict[str, Array] = {}
    for file in sorted(files):
        found = read(whole.parent / file)
        named = dict.fromkeys(name for name, shard in shard_of.items() if shard == file)
        check_names(dict.fromkeys(found), named, what=f"in {file} the arrays that {index} names")
        state |= found
    return state


def _module(path: str) -> dict[str, Array]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} as a module takes PyTorch, which is not installed: pip install 'dalle-jax[convert]'"
        ) from error
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a file that is no pickle raises KeyError, IndexError or anything else
        raise UserError(
            f"{path} does not load: {error}; the package that defines it must be installed to unpickle"
        ) from error
    found = module.state_dict() if hasattr(module, "state_dict") else module
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"expected a module or its state dict in {path}, got a {type(module).__name__}")
    return {name: value.detach().float().numpy() for name, value in found.items()}


def check_names(
    state: Mapping, shapes: Mapping[str, tuple[int, ...] | None], *, what: str, advice: str = "fetch the file again"
) -> None:
    """Refuse arrays that are not those of a table: the first that is missing, surplus or of another shape.

    shapes: name -> shape, or None for any. what: is expected, as 'a whole VQGAN'.

    Raises:
      UserError: with the first wrong name, and how many more there are.
    """
    if missing := sorted(shapes.keys() - state.keys()):
        raise UserError(f"expected {what}, but {_first(missing)} missing: {advice}")
    if surplus := sorted(state.keys() - shapes.keys()):
        raise UserError(f"expected {what} alone, but {_first(surplus)} there too: remove what is not it")
    wrong = [name for name, shape in shapes.items() if shape is not None and tuple(state[name].shape) != tuple(shape)]
    if wrong:
        raise UserError(
            f"expected {what}, {wrong[0]} of shape {tuple(shapes[wrong[0]] or ())}, got {tuple(state[wrong[0]].shape)}"
            + (f", and {len(wrong) - 1} more of other shapes" if wrong[1:] else "")
            + f": {advice}"
        )


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more are" if names[1:] else f"{names[0]} is"


def leaves(abstract: Params) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The parameters of a model by their paths."""
    found = jax.tree_util.tree_leaves_with_path(abstract)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in found}


def renamed(state: State, names: Mapping[tuple[str, ...], str], abstract: Params, *, what: str) -> Params:
    """A state dict as nested parameters: float32, kernels of convolutions in the order [height, width, in, out].

    names: path of every parameter -> its name in the state dict. abstract: the model's parameters, for their shapes.
    what: is expected, as 'a whole VQGAN'.

    Raises:
      UserError: an array is missing, left over, of another shape or not finite.
    """
    shapes = {names[path]: _stored_shape(leaf.shape) for path, leaf in leaves(abstract).items()}
    check_names(state, shapes, what=what)
    found = {}
    for path, name in names.items():
        array = finite(name, np.asarray(state[name], np.float32))
        found[path] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    return unflatten_dict(found)


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape


def joined_shape(shape: Sequence[int], *, parts: int, inputs: int | None) -> tuple[int, ...]:
    """The shape of each of the arrays that are joined along their outputs in a parameter of a layer.

    inputs: of matrices, which are stored as [outputs, inputs]; None: they are vectors.
    """
    outputs = math.prod(shape) // parts
    return (outputs,) if inputs is None else (outputs // inputs, inputs)


def stacked(
    state: dict[str, Array], layers: Sequence[Sequence[str]], shape: Sequence[int], *, matrix: bool
) -> np.ndarray:
    """One parameter of all layers, in the type of the first array; what it is made of is taken out of `state`.

    layers: names of each layer's arrays, which are joined along their outputs. shape: of one layer's parameter. matrix:
    the arrays are [outputs, inputs].

    Raises:
      UserError: an array is not finite.
    """
    whole = np.empty(0)
    for i, names in enumerate(layers):
        array = np.concatenate([finite(name, state.pop(name)) for name in names])
        if i == 0:
            whole = np.empty((len(layers), *shape), array.dtype)
        whole[i] = (array.T if matrix else array).reshape(shape)
    return whole


def finite(name: str, array: Array) -> np.ndarray:
    """The array, read if it is stored; raises UserError where it has a number that is infinite or none."""
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise UserError(f"expected finite weights, got inf or nan in {name}: fetch the file again")
    return array
