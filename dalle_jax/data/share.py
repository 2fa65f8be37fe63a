"""The part of a job that one of several workers does: processes that read data, machines that encode or evaluate."""

import dataclasses

from dalle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count`: every `count`-th item, beginning with item `index`."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"index must be 0 .. count - 1, got index {self.index} and count {self.count}")

    @staticmethod
    def of_option(text: str) -> "Share":
        """The share that `--part I/N` names.

        Raises:
          UserError: not two numbers, or I is not below N.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"expected --part I/N with I from 0 to N - 1, got {text!r}: e.g. 0/4, 1/4, 2/4 and 3/4")
        return Share(int(index), int(count))

    @property
    def slice(self) -> slice:
        """`items[share.slice]` is this share, in order; the shares of all workers together are the items, each once."""
        return slice(self.index, None, self.count)


WHOLE = Share()
