"""Names and arrays from the files that published weights come in: safetensors, or PyTorch's own.

torch is imported only for the latter. Knows nothing of any model.
"""

import os
from collections.abc import Mapping

import numpy as np

from dalle_jax.errors import UserError


def read_state_dict(path: str, *, allow_pickle: bool | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, a torch state dict or, if allowed, a pickled torch module.

    allow_pickle: None where the user is not asked, so that an error does not name the option.

    Raises:
      UserError: not there, not readable, or a pickled module without `allow_pickle`.
    """
    if not os.path.isfile(path):
        raise UserError(f"expected a file with a state dict, but {path} does not exist")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"expected a safetensors file, but {path} does not read as one: {error}") from error
    return _read_torch(path, allow_pickle=allow_pickle)


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
    except Exception as error:  # of a file that is no pickle: KeyError, IndexError or whatever
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
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"expected a state dict (names and tensors) in {path}, got a {type(loaded).__name__}")
    return {name: value.detach().float().numpy() for name, value in loaded.items()}
