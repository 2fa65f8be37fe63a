"""Floating-point operations of a step, by counting rules that do not depend on how it is compiled.

A multiply-add counts two. Counted are matrix products and convolutions; norms, activations, softmax and the optimizer
are not (together under 1 % at the paper's sizes). The transformer's attention counts the pairs of query and key that
the pattern allows, exactly, not the blocks they are computed in. Training counts three forward passes: the gradient
of a product is two more of its size. What rematerialization computes again is not the model's work: `recomputed`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from dalle_jax import attention_pattern
from dalle_jax.models import Model, image_tokenizer
from dalle_jax.models.transformer import TransformerConfig

TRAINING_PASSES = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """The computation of one training example, forward and backward.

    tokens: its positions. model_flops: by the rules above. executed_flops: with recomputation and the frozen image
    tokenizer. scores: attention scores of all layers that lie in memory as arrays, 0 with a fused kernel.
    result_bytes: of the results of all products of the forward pass, if the loss was traced, and what is added where
    they are widened, as into a residual stream of float32.
    """

    tokens: int
    model_flops: int
    executed_flops: int
    scores: int = 0
    result_bytes: tuple[int, ...] = ()


def transformer_work(config: TransformerConfig, tokenizer: Model | None) -> Work:
    """The work of a transformer. tokenizer: what encodes its images; None if they are image tokens already."""
    total = transformer(config)
    executed = total + recomputed(config) + (0 if tokenizer is None else _encoding(tokenizer))
    scores = attention(config) // (4 * config.head_size) if config.attention == "xla" else 0
    return Work(config.layout.length, total, executed, scores=scores)


def traced_work(loss, model: Model, example: Any, *, trained: bool = True) -> Work:
    """The work of any model with `config.grid`, from the trace of loss(params, example).

    example: abstract, of one. trained: all products have factors that are trained, and the loss takes no gradients
    itself; else they are counted in the trace of its gradient, as some are not gone through backwards or only by half.
    """
    found = list(_products(jax.make_jaxpr(loss)(model.abstract, example).jaxpr))
    total = TRAINING_PASSES * _total(found) if trained else traced(jax.grad(loss), model.abstract, example)
    return Work(model.config.grid**2, total, total, result_bytes=tuple(size for *_, size in found))


@functools.cache
def _encoding(tokenizer: Model) -> int:
    size = tokenizer.config.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jax.numpy.uint8)
    return traced(functools.partial(image_tokenizer.encode, tokenizer), tokenizer.abstract, image)


def transformer_layers(config: TransformerConfig) -> int:
    """FLOPs of all layers for one sequence, forward."""
    width, inner, length = config.width, config.heads * config.head_size, config.layout.length
    projections = 4 * width * inner + 8 * width**2  # q, k, v and output; up and down, four times as wide
    return 2 * config.num_layers * projections * length + attention(config)


def attention(config: TransformerConfig) -> int:
    """FLOPs of all layers' scores and weighted sums for one sequence, forward."""
    kinds = set(config.kinds)
    pairs = {k: int(attention_pattern.allowed(k, text_len=config.text_len, grid=config.grid).sum()) for k in kinds}
    return 4 * config.heads * config.head_size * sum(pairs[kind] for kind in config.kinds)


def transformer(config: TransformerConfig) -> int:
    """FLOPs of one training sequence of the transformer, forward and backward."""
    heads = 2 * config.width * config.layout.logits
    return TRAINING_PASSES * (transformer_layers(config) + heads)


def recomputed(config: TransformerConfig) -> int:
    """FLOPs that the backward pass computes again for one sequence, by `config.remat`.

    `attention` computes the scores again, `dots` too (it keeps the projections), `full` everything. A fused kernel
    goes through the scores twice on its way back: seven products, where four would do if they had been kept.
    """
    kernel = 0 if config.attention == "xla" else 3 * attention(config) // 2
    if config.remat == "none":
        return kernel
    return kernel + (transformer_layers(config) if config.remat == "full" else attention(config))


def traced(function, *args: Any) -> int:
    """FLOPs of matrix products and convolutions in `function(*args)`, counted in its trace; args may be abstract.

    A loop counts as often as it runs; of a conditional the branch that costs most, as if it were taken.
    """
    return _total(_products(jax.make_jaxpr(function)(*args).jaxpr))


def _total(products: Iterable[tuple[int, int, int]]) -> int:
    return sum(times * count for times, count, _ in products)


def _products(jaxpr) -> Iterator[tuple[int, int, int]]:
    """For each product how often it runs, its FLOPs and the bytes of its result; a widening has bytes alone."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        result: Any = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[i] for i in left)
            yield 1, 2 * math.prod(result.shape) * contracted, _bytes(result)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channel = params["dimension_numbers"].rhs_spec[0]  # the kernel's dimension of output channels
            zeros = math.prod(params["lhs_dilation"])  # lie between the inputs of a strided convolution's gradient
            yield 1, 2 * math.prod(result.shape) * math.prod(kernel) // kernel[channel] // zeros, _bytes(result)
        elif name == "convert_element_type" and 0 < (more := _bytes(result) - _bytes(equation.invars[0].aval)):
            if jax.numpy.issubdtype(equation.invars[0].aval.dtype, jax.numpy.floating):
                yield 1, 0, more
        elif name == "cond":
            yield from max((list(_products(branch)) for branch in _inner(params)), key=_total)
        else:
            outer = params["length"] if name == "scan" else 1
            for inner in _inner(params):
                yield from ((outer * times, count, size) for times, count, size in _products(inner))


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _inner(params) -> list:
    """The jaxprs among the parameters of an equation, closed or open, alone or in a tuple."""
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    found = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]
