"""The blocks of a mask that are not empty: what a kernel that works block by block visits, and what it leaves out.

Made of any bool mask when a program is traced. Numpy only; knows nothing of attention kinds or kernels. Here Z are the
entries of the longest list.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """For each block of rows of a mask the blocks of columns that are not empty.

    counts: int32 [R, 2], the steps that need no mask, and all of them. columns: int32 [R, Z], the block of each step,
      those that need no mask first, in ascending order both, then zeros. partial: int32 [R, Z], where a step needs a
      mask its index in masks, else 0. masks: int8 [count, Q, K], every different block that is neither full nor empty.
    """

    counts: np.ndarray
    columns: np.ndarray
    partial: np.ndarray
    masks: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The fields in their order, as a kernel takes them."""
        return self.counts, self.columns, self.partial, self.masks

    @property
    def steps(self) -> int:
        """Number of visited blocks, all rows together."""
        return int(self.counts[:, 1].sum())


def block_lists(mask_SS: np.ndarray, *, size: int) -> BlockLists:
    """The lists of blocks of `size` x `size`.

    Raises:
      ValueError: a size of the mask that is no multiple of size, or a row of blocks without any allowed pair.
    """
    if any(length % size for length in mask_SS.shape):
        raise ValueError(f"expected a mask whose sizes are multiples of {size}, got {mask_SS.shape}")
    rows, columns = (length // size for length in mask_SS.shape)
    blocks = mask_SS.reshape(rows, size, columns, size).swapaxes(1, 2)
    full, some = np.all(blocks, (2, 3)), np.any(blocks, (2, 3))
    if not some.any(1).all():
        raise ValueError("expected a mask that allows something in every row of blocks")
    lists = [(np.flatnonzero(full[r]), np.flatnonzero(some[r] & ~full[r])) for r in range(rows)]
    longest = max(len(plain) + len(partial) for plain, partial in lists)
    counts = np.array([(len(plain), len(plain) + len(partial)) for plain, partial in lists], np.int32)
    visited, mask_index = np.zeros((2, rows, longest), np.int32)
    index: dict[bytes, int] = {}
    for r, (plain, partial) in enumerate(lists):
        visited[r, : counts[r, 1]] = np.concatenate([plain, partial])
        mask_index[r, counts[r, 0] : counts[r, 1]] = [
            index.setdefault(blocks[r, c].tobytes(), len(index)) for c in partial
        ]
    masks = [np.frombuffer(key, np.int8).reshape(size, size) for key in index] or [np.ones((size, size), np.int8)]
    return BlockLists(counts, visited, mask_index, np.stack(masks))
