"""Published text-to-image transformers: how each computes otherwise than DALL-E (Ramesh et al. 2021).

minDALL-E (Kakao Brain 2021) is a plain GPT over text and image; ru-DALL-E's Malevich (Sber 2021) has DALL-E's masks,
the sandwich norms of CogView (Ding et al. 2021) and a norm and biases in its heads, and its first release, v2, lays the
masks out one position late.
"""

import dataclasses
from collections.abc import Callable

import jax

from dalle_jax.models.layers import quick_gelu


@dataclasses.dataclass(frozen=True)
class Family:
    """The ways of a family, where they are not DALL-E's.

    first, marks: of its `layout.Layout`. activation: of the MLP. sandwich: a norm behind each residual branch too.
    head_norm: one more norm before the heads, which have biases. grid_positions: image positions have a vector of their
    row and one of their column, else one each.
    """

    first: str = "start"
    marks: tuple[int, int] | None = None
    activation: Callable = quick_gelu
    sandwich: bool = False
    head_norm: bool = False
    grid_positions: bool = True


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _malevich(first: str) -> Family:
    marks = (2, 3)  # of YouTokenToMe
    return Family(first, marks, activation=jax.nn.gelu, sandwich=True, head_norm=True)  # approximated by tanh


FAMILIES = {
    "dalle": Family(),
    "mindalle": Family("none", activation=_gelu, grid_positions=False),
    "malevich": _malevich("none"),
    "malevich-v2": _malevich("text"),
}
