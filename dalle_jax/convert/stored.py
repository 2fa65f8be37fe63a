"""An array that stays in its file until it is read, so that a model is converted one array at a time."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from dalle_jax.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Stored:
    """Shape and type of an array in a file; `np.asarray` reads it, bit for bit, anew each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


Array: TypeAlias = np.ndarray | Stored
State: TypeAlias = Mapping[str, Array]


def numbers(
    path: str, dtype: np.dtype, shape: tuple[int, ...], *, start: int, strides: tuple[int, ...] | None = None
) -> Stored:
    """An array whose numbers lie at byte `start` of a file; strides: in numbers, None for row after row."""

    def read() -> np.ndarray:
        with reading(path):
            if 0 in shape:
                return np.empty(shape, dtype)
            last = math.prod(shape) - 1
            if strides is not None:
                last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            flat = np.fromfile(path, dtype, 1 + last, offset=start)
            if len(flat) <= last:
                raise ValueError(f"{1 + last} numbers from byte {start} on, got {len(flat)}")
            if strides is None:
                return flat.reshape(shape)
            steps = [stride * dtype.itemsize for stride in strides]
            return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    return Stored(shape, dtype, read)


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Raise UserError where the block, which reads a file of others, stumbles over anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file makes parsers raise anything
        raise UserError(
            f"expected a whole file of weights in {path}, got {first_line(error)}: fetch it again"
        ) from error
