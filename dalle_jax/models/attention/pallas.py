"""Attention of a whole sequence as fused GPU kernels, forward and backward: scores never reach memory.

After FlashAttention (Dao 2023) in a block-sparse form. A program holds one block of queries of one head and walks over
the key blocks that the pattern's mask does not leave empty (`block_lists.py`), with a running softmax. The backward
pass computes the scores again from the saved logarithms of their sums: once for the gradients of the queries and once,
walking over query blocks, for those of keys and values. No atomics, so the same bits every time. What is allowed comes
from `attention_pattern.allowed` alone. In Pallas for Triton, which needs compute capability 8.0.

A column layer's image states are visited in transposed order, column by column, so that its keys lie in few blocks
too. Nothing is transposed in memory: a kernel reads one head of single positions anyway.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dalle_jax import attention_pattern
from dalle_jax.models.attention.block_lists import BlockLists, block_lists
from dalle_jax.models.attention.blockwise import MASKED
from dalle_jax.sharding import per_device

BLOCK = 64  # queries and keys of a block; larger ones visit more pairs that are not allowed
HEAD_SIZES = (16, 32, 64, 128)  # Triton multiplies blocks whose sides are powers of 2, of at least 16
LOG2_E = math.log2(math.e)  # GPUs have an instruction for powers of 2
WARPS, STAGES = 4, 2  # of a program, and of loads in flight in its loop

STATES = ("batch", "sequence", "heads", "head")
SUMS = ("batch", "heads", "sequence")


def check(*, length: int, head_size: int, block: int = BLOCK) -> None:
    """Raises ValueError for shapes that the kernels cannot compute with."""
    if length % block:
        raise ValueError(
            f"attention 'pallas' needs text_len + grid * grid to be a multiple of {block}, got {length}: use 'xla'"
        )
    if head_size not in HEAD_SIZES:
        raise ValueError(f"attention 'pallas' needs one of {HEAD_SIZES} as head_size, got {head_size}: use 'xla'")


def attend(
    q_BSNH,
    k_BSNH,
    v_BSNH,
    kind: str,
    *,
    text_len: int,
    grid: int,
    block: int = BLOCK,
    warps: int = WARPS,
    stages: int = STAGES,
    interpret: bool = False,
):
    """Equal to `blockwise.attend`. Softmax and sums in float32, result in q's dtype.

    block: a power of 2, at least 16. block, warps and stages change speed alone. interpret: run the kernels as array
    code, on any machine and slowly, for tests.

    Raises:
      ValueError: shapes that `check` refuses.
    """
    check(length=q_BSNH.shape[1], head_size=q_BSNH.shape[-1], block=block)
    return _attend(q_BSNH, k_BSNH, v_BSNH, _Plan(kind, text_len, grid, block, warps, stages, interpret))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static arguments of a call."""

    kind: str
    text_len: int
    grid: int
    block: int
    warps: int
    stages: int
    interpret: bool

    def lists(self, *, by_keys: bool) -> BlockLists:
        """Lists of key blocks for each query block; by_keys: of query blocks for each key block, with masks [K, Q]."""
        mask = attention_pattern.allowed(self.kind, text_len=self.text_len, grid=self.grid)
        order = attention_pattern.compact_order(self.kind, text_len=self.text_len, grid=self.grid)
        mask = mask[np.ix_(order, order)]
        return block_lists(mask.T if by_keys else mask, size=self.block)

    def rows(self, index):
        """Positions of the states of block number `index` of `attention_pattern.compact_order`, int32 [Q] or [K]."""
        slots = index * self.block + jnp.arange(self.block)
        if self.kind != "column":
            return slots
        image = jnp.maximum(slots - self.text_len, 0)
        row, column = jax.lax.rem(image, self.grid), jax.lax.div(image, self.grid)
        return jnp.where(slots < self.text_len, slots, self.text_len + row * self.grid + column)

    def slots(self, index):
        """Where that block is in arrays that are stored in that order."""
        return pl.ds(index * self.block, self.block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q_BSNH, k_BSNH, v_BSNH, plan: _Plan):
    return _forward(q_BSNH, k_BSNH, v_BSNH, plan)[0]


def _forward(q_BSNH, k_BSNH, v_BSNH, plan: _Plan):
    call = functools.partial(_call_forward, plan)
    out_BSNH, log_BNS = per_device(call, q_BSNH, k_BSNH, v_BSNH, names=(STATES,) * 3, results=(STATES, SUMS))
    return out_BSNH, (q_BSNH, k_BSNH, v_BSNH, out_BSNH, log_BNS)


def _backward(plan: _Plan, saved, cotangent_BSNH):
    call = functools.partial(_call_backward, plan)
    names = (STATES,) * 4 + (SUMS, STATES)
    return per_device(call, *saved, cotangent_BSNH, names=names, results=(STATES,) * 3)


_attend.defvjp(_forward, _backward)


def _call_forward(plan: _Plan, q_BSNH, k_BSNH, v_BSNH):
    lists = plan.lists(by_keys=False)
    out = jax.ShapeDtypeStruct(q_BSNH.shape, q_BSNH.dtype), _sums_like(q_BSNH)
    return _call(_forward_kernel, plan, lists, (q_BSNH, k_BSNH, v_BSNH), out, name="attention_forward")


def _call_backward(plan: _Plan, q_BSNH, k_BSNH, v_BSNH, out_BSNH, log_BNS, cotangent_BSNH):
    like = jax.ShapeDtypeStruct(q_BSNH.shape, q_BSNH.dtype)
    given = (q_BSNH, k_BSNH, v_BSNH, out_BSNH, log_BNS, cotangent_BSNH)
    lists = plan.lists(by_keys=False)
    dq_BSNH, dot_BNS = _call(_query_kernel, plan, lists, given, (like, _sums_like(q_BSNH)), name="attention_dq")
    given = (q_BSNH, k_BSNH, v_BSNH, log_BNS, dot_BNS, cotangent_BSNH)
    dk_BSNH, dv_BSNH = _call(_key_kernel, plan, plan.lists(by_keys=True), given, (like, like), name="attention_dkv")
    return dq_BSNH, dk_BSNH, dv_BSNH


def _sums_like(q_BSNH):
    B, S, N, _ = q_BSNH.shape
    return jax.ShapeDtypeStruct((B, N, S), jnp.float32)


def _call(kernel, plan: _Plan, lists: BlockLists, arrays, results, *, name: str):
    """One program for each block, head and sequence; it sees the lists, and all positions of its head of each array."""
    B, S, N, H = arrays[0].shape
    whole = lambda a: pl.BlockSpec(a.shape, lambda block, head: (0,) * a.ndim)  # noqa: E731
    states = pl.BlockSpec((None, S, None, H), lambda block, head: (head // N, 0, head % N, 0))
    sums = pl.BlockSpec((None, None, S), lambda block, head: (head // N, head % N, 0))
    specs = lambda all_: [states if len(a.shape) == 4 else sums for a in all_]  # noqa: E731
    tables = [jnp.asarray(table) for table in lists.arrays]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(S // plan.block, B * N),  # two, as vmap adds one and a GPU knows three
        in_specs=[*map(whole, tables), *specs(arrays)],
        out_specs=specs(results),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=plan.interpret,
        name=name,
    )(*tables, *arrays)


def _forward_kernel(plan, *refs):
    *tables, q_ref, k_ref, v_ref, out_ref, log_ref = refs
    rows, own = _own(plan)
    q = q_ref[rows, :]
    scale = LOG2_E * q.shape[-1] ** -0.5

    def step(carry, keys, mask):
        out, top, total = carry
        k, v = k_ref[plan.rows(keys), :], v_ref[plan.rows(keys), :]
        scores = mask(_dot(q, k.T) * scale)
        new_top = jnp.maximum(top, scores.max(1))
        weights, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, new_top, total * shrink + weights.sum(1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(len(q), MASKED, jnp.float32), jnp.zeros(len(q), jnp.float32)
    out, top, total = _walk(tables, step, start)
    out_ref[rows, :] = (out / total[:, None]).astype(out_ref.dtype)
    log_ref[own] = top + jnp.log2(total)


def _query_kernel(plan, *refs):
    """Gradient of one block of queries, and the sums that a softmax's gradient subtracts."""
    *tables, q_ref, k_ref, v_ref, out_ref, log_ref, cotangent_ref, dq_ref, dot_ref = refs
    rows, own = _own(plan)
    q, cotangent, log = q_ref[rows, :], cotangent_ref[rows, :], log_ref[own]
    dot = (out_ref[rows, :].astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(1)
    dot_ref[own] = dot
    scale = LOG2_E * q.shape[-1] ** -0.5

    def step(dq, keys, mask):
        k, v = k_ref[plan.rows(keys), :], v_ref[plan.rows(keys), :]
        weights = jnp.exp2(mask(_dot(q, k.T) * scale) - log[:, None])
        d_scores = weights * (_dot(cotangent, v.T) - dot[:, None])
        return dq + _dot(d_scores.astype(k.dtype), k)

    dq = _walk(tables, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[rows, :] = (dq * q.shape[-1] ** -0.5).astype(dq_ref.dtype)


def _key_kernel(plan, *refs):
    """Gradients of one block of keys and values. Scores are [K, Q] here."""
    *tables, q_ref, k_ref, v_ref, log_ref, dot_ref, cotangent_ref, dk_ref, dv_ref = refs
    rows, _ = _own(plan)
    k, v = k_ref[rows, :], v_ref[rows, :]
    scale = LOG2_E * k.shape[-1] ** -0.5

    def step(carry, queries, mask):
        dk, dv = carry
        q, cotangent = q_ref[plan.rows(queries), :], cotangent_ref[plan.rows(queries), :]
        log, dot = log_ref[plan.slots(queries)], dot_ref[plan.slots(queries)]
        weights = jnp.exp2(mask(_dot(k, q.T) * scale) - log[None])
        d_scores = weights * (_dot(v, cotangent.T) - dot[None])
        return dk + _dot(d_scores.astype(q.dtype), q), dv + _dot(weights.astype(cotangent.dtype), cotangent)

    dk, dv = _walk(tables, step, (jnp.zeros(k.shape, jnp.float32),) * 2)
    dk_ref[rows, :] = (dk * k.shape[-1] ** -0.5).astype(dk_ref.dtype)
    dv_ref[rows, :] = dv.astype(dv_ref.dtype)


def _own(plan):
    """Positions of the program's own block, and where it is in arrays stored in the order of blocks."""
    return plan.rows(pl.program_id(0)), plan.slots(pl.program_id(0))


def _walk(tables, step, carry):
    """step(carry, block, mask) over the list of the program's block; mask: scores -> scores."""
    counts_ref, columns_ref, partial_ref, masks_ref = tables
    own = pl.program_id(0)
    plain, all_ = counts_ref[own, 0], counts_ref[own, 1]

    def unmasked(i, carry):
        return step(carry, columns_ref[own, i], lambda scores: scores)

    def masked(i, carry):
        allowed = masks_ref[partial_ref[own, i], :, :] != 0
        return step(carry, columns_ref[own, i], lambda scores: jnp.where(allowed, scores, MASKED))

    return jax.lax.fori_loop(plain, all_, masked, jax.lax.fori_loop(0, plain, unmasked, carry))


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
