"""The part of a job that one of several workers does: processes that read data, machines that encode or evaluate."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count`: every `count`-th item, beginning with item `index`."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"index must be 0 .. count - 1, got index {self.index} and count {self.count}")

    @property
    def slice(self) -> slice:
        """`items[share.slice]` is this share, in order; the shares of all workers together are the items, each once."""
        return slice(self.index, None, self.count)


WHOLE = Share()
