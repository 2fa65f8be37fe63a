"""The first steps of every importer: read published arrays, rename them and nest them.

Files are safetensors or PyTorch's; torch is imported only for the latter. Knows nothing of any model.
"""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.models import Params

STATE_KEYS = ("state_dict", "model", "module")  # of checkpoints by Lightning, by hand and by DeepSpeed


def read(path: str | os.PathLike, *, allow_pickle: bool | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, a torch state dict, also within a checkpoint, or, if allowed, a pickled module.

    allow_pickle: None where the command has no such option, so that errors do not name it.

    Raises:
      UserError: not there, not readable, or a pickled module without `allow_pickle`.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"expected a file with a state dict, but {path} does not exist")
    if not path.endswith(".safetensors"):
        return _read_torch(path, allow_pickle=allow_pickle)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"expected a safetensors file, but {path} does not read as one: {error}") from error


def _read_torch(path: str, *, allow_pickle: bool | None) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} takes PyTorch, which is not installed: "
            "pip install 'dalle-jax[convert]', or give a .safetensors file"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # a file that is no pickle raises KeyError, IndexError or anything else
        if not allow_pickle:
            offer = "" if allow_pickle is None else ", or pass --allow-pickle if you trust the file"
            raise UserError(
                f"expected a state dict, but {path} holds other Python objects or is broken: make one with "
                f"torch.save(module.state_dict(), FILE){offer}"
            ) from error
        raise UserError(
            f"{path} does not load: {error}; the package that defines it must be installed to unpickle"
        ) from error
    if hasattr(loaded, "state_dict"):
        loaded = loaded.state_dict()
    elif isinstance(loaded, Mapping):  # a checkpoint of a training has it beside the state of the optimizer
        loaded = next((loaded[key] for key in STATE_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"expected a state dict (names and tensors) in {path}, got a {type(loaded).__name__}")
    return {name: value.detach().float().numpy() for name, value in loaded.items()}


def renamed(state: Mapping[str, np.ndarray], path_of: Callable[[str], Sequence[str]]) -> Params:
    """A state dict as nested parameters: float32, kernels of convolutions in the order [height, width, in, out].

    path_of: name in the state dict -> keys in the parameters.

    Raises:
      UserError: an array that is not finite, or one whose name goes on behind that of another.
    """
    params: Params = {}
    for name, array in state.items():
        array = finite(name, np.asarray(array, np.float32))
        *path, leaf = path_of(name)
        node = params
        for key in path:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict):
            raise UserError(f"expected one array or several under a name, got {name} beside one: fetch the file again")
        node[leaf] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    return params


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array; raises UserError where it is not finite."""
    if not np.isfinite(array).all():
        raise UserError(f"expected finite weights, got others in {name}: fetch the file again")
    return array
