"""Attention of a whole sequence as fused TPU kernels: JAX's splash attention under the pattern's masks.

Splash attention is a block-sparse flash attention, forward and backward, that skips the empty blocks of a mask known
when it is traced. It wants sequences of whole lanes of 128, and column layers on transposed image states, as their
keys would lie in every block otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from dalle_jax import attention_pattern
from dalle_jax.sharding import per_device

BLOCK = 128  # queries and keys of a block: the lanes of a TPU's registers, so no smaller one is possible

STATES = ("batch", "sequence", "heads", "head")


def check(*, length: int, head_size: int) -> None:
    """Raises ValueError for shapes that the kernels cannot compute with."""
    if length % BLOCK:
        raise ValueError(
            f"attention 'splash' needs text_len + grid * grid to be a multiple of {BLOCK}, got {length}: use 'xla'"
        )
    if head_size % 8:
        raise ValueError(f"attention 'splash' needs a head_size of a multiple of 8, got {head_size}: use 'xla'")


def attend(q_BSNH, k_BSNH, v_BSNH, kind: str, *, text_len: int, grid: int, interpret: bool = False):
    """Equal to `blockwise.attend`. Softmax and sums in float32, result in q's dtype.

    interpret: run the kernels as array code, on any machine and slowly, for tests.

    Raises:
      ValueError: shapes that `check` refuses.
    """
    check(length=q_BSNH.shape[1], head_size=q_BSNH.shape[-1])
    mask = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
    order = attention_pattern.compact_order(kind, text_len=text_len, grid=grid)
    attend_pieces = functools.partial(_attend, mask[order][:, order], interpret)

    def toggle(x_BSNH):
        """The image column by column for column layers, and back again."""
        return _transposed(x_BSNH, text_len=text_len, grid=grid) if kind == "column" else x_BSNH

    states = (toggle(q_BSNH * q_BSNH.shape[-1] ** -0.5), toggle(k_BSNH), toggle(v_BSNH))
    return toggle(per_device(attend_pieces, *states, names=(STATES,) * 3, results=(STATES,))[0])


def _attend(mask_SS, interpret: bool, *states):
    head = splash_attention.NumpyMask(mask_SS)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([head] * states[0].shape[2]),
        block_sizes=splash_attention.BlockSizes(
            block_q=BLOCK,
            block_kv=BLOCK,
            block_q_dkv=BLOCK,
            block_kv_dkv=BLOCK,
            block_q_dq=BLOCK,
            block_kv_dq=BLOCK,
        ),
        interpret=interpret,
    )
    q_BNSH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in states)
    return (jax.vmap(kernel)(q_BNSH, k_BNSH, v_BNSH).swapaxes(1, 2),)


def _transposed(x_BSNH, *, text_len: int, grid: int):
    """The image column by column, and back again."""
    B, S, N, H = x_BSNH.shape
    image = x_BSNH[:, text_len:].reshape(B, grid, grid, N, H).swapaxes(1, 2)
    return jnp.concatenate([x_BSNH[:, :text_len], image.reshape(B, S - text_len, N, H)], axis=1)
