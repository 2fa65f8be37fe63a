"""The choice of code for attention over whole sequences, `TransformerConfig.attention`, and where each runs.

    xla      plain array code in blocks, on every machine (`blockwise.py`); the others must equal and beat it
    pallas   fused kernels for GPUs of compute capability 8.0 and later (`pallas.py`)
    splash   fused kernels for TPUs (`splash.py`)

A choice changes the order of sums and what they cost, never what is computed.
"""

from types import ModuleType

from dalle_jax.errors import UserError
from dalle_jax.models.attention import blockwise

ATTENTION = ("xla", "pallas", "splash")
MIN_CAPABILITY = (8, 0)


def check_shapes(name: str, *, length: int, head_size: int) -> None:
    """Raises ValueError for a name that is not in ATTENTION, or shapes that its code cannot compute with."""
    if name not in ATTENTION:
        raise ValueError(f"attention must be one of {ATTENTION}, got {name!r}")
    if name != "xla":
        _module(name).check(length=length, head_size=head_size)


def check_machine(name: str, *, machine: str, platform: str, capability: tuple[int, ...] | None = None) -> None:
    """Raises UserError where this code does not run on that machine.

    machine: its name, for the message. platform: 'cpu', 'gpu' or 'tpu'. capability: of a GPU, (9, 0).
    """
    runs = {
        "xla": True,
        "pallas": platform == "gpu" and (capability is None or capability >= MIN_CAPABILITY),
        "splash": platform == "tpu",
    }
    if not runs[name]:
        wanted = {"pallas": "a GPU of compute capability 8.0 or later (A100, H100)", "splash": "a TPU"}[name]
        raise UserError(
            f"expected {wanted} for config.model.attention = {name}, got {machine}: set --config.model.attention=xla"
        )


def attend(name: str):
    """The function of that name, with the arguments of `blockwise.attend`."""
    return _module(name).attend


def _module(name: str) -> ModuleType:
    """Imported on request: both kernels stand on experimental parts of JAX, which a version may lack."""
    if name == "pallas":
        from dalle_jax.models.attention import pallas

        return pallas
    if name == "splash":
        from dalle_jax.models.attention import splash

        return splash
    return blockwise
