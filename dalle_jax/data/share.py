"""The part of a job that one of several workers does: processes that read data, machines that encode or evaluate."""

import dataclasses
from typing import Protocol, TypeVar

Slices = TypeVar("Slices", bound="Sliceable")


class Sliceable(Protocol):
    """A range, a sequence, a Grain dataset: what can be cut by a slice."""

    def __getitem__(self: Slices, index: slice, /) -> Slices: ...


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count`: every `count`-th item, beginning with item `index`."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"index must be 0 .. count - 1, got index {self.index} and count {self.count}")

    def of(self, items: Slices) -> Slices:
        """This share of the items, in their order. The shares of all workers together are the items, each once."""
        return items[self.index :: self.count]


WHOLE = Share()
