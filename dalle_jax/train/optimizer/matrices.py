"""The parameters that get weight decay, and the hidden matrices, read off the names of their dimensions.

Leaving out STACKED dimensions, and counting a run of HEADS as one:

    decayed         two dimensions or more, and not a lookup table (first of them in TABLES). So projections,
                    convolutions and output heads decay; gains, biases and embeddings do not. The paper does not say
                    which parameters it excludes; this is the usual choice.
    hidden matrix   decayed, and no dimension in TABLES at all: neither an embedding nor an output head. Muon, 16-bit
                    storage and compression are for these alone.
"""

from typing import Any

import jax
import optax

STACKED = ("layers", "qkv")  # one independent parameter per index of these dimensions
TABLES = ("vocab", "image_input", "position")  # a parameter indexed by these is a lookup table
HEADS = ("heads", "head")  # together one side of a matrix


def decay_mask(axes: Any, *, tables: bool = False) -> Any:
    """Nested dict of bool: does this parameter get weight decay?

    tables: lookup tables decay too, as CLIP's do (Radford et al. 2021, section 2.5).
    """

    def decays(names):
        return _decays(names) or (tables and len(_sides(names)) >= 2)

    return jax.tree.map(decays, axes, is_leaf=is_names)


def hidden_mask(axes: Any) -> Any:
    """Nested dict of bool: is this parameter a hidden matrix?"""
    return jax.tree.map(lambda names: dimensions(names) is not None, axes, is_leaf=is_names)


def dimensions(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """The dimensions of a hidden matrix that are its inputs and those that are its outputs; None if it is none.

    Stacked dimensions belong to neither, so each layer's matrix is orthogonalized by itself. The output is the last
    side; everything before it (also height and width of a convolution's kernel) is the input.
    """
    if not _decays(names) or any(name in TABLES for name in names):
        return None
    *inputs, output = _sides(names)
    return optax.contrib.MuonDimensionNumbers(sum(inputs, ()), output)


def is_names(leaf: Any) -> bool:
    """Whether this node of a model's `axes` is a parameter's tuple of names, for `jax.tree.map(is_leaf=)`."""
    return isinstance(leaf, tuple)


def _decays(names: tuple[str | None, ...]) -> bool:
    sides = _sides(names)
    return len(sides) >= 2 and names[sides[0][0]] not in TABLES


def _sides(names: tuple[str | None, ...]) -> list[tuple[int, ...]]:
    """Dimensions that are not stacked; neighboring HEADS count as one."""
    sides: list[tuple[int, ...]] = []
    for index, name in enumerate(names):
        if name in STACKED:
            continue
        if sides and name in HEADS and names[sides[-1][-1]] in HEADS:
            sides[-1] += (index,)
        else:
            sides.append((index,))
    return sides
