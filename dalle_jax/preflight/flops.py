"""How many floating-point operations an update takes, by counting rules that do not depend on how it is compiled.

A multiply-add counts two. Counted are matrix products and convolutions; norms, activations, softmax and the optimizer
are not (together under 1 % at the paper's sizes). The transformer's attention counts the pairs of query and key that
the pattern allows, exactly, not the blocks they are computed in. Training counts three forward passes: the gradient
of a product is two more of its size. What rematerialization computes again is not the model's work: `recomputed`.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from dalle_jax import attention_pattern
from dalle_jax.models.transformer import TransformerConfig

TRAINING_PASSES = 3


def transformer_layers(config: TransformerConfig) -> int:
    """Of all layers for one sequence, forward."""
    width, inner, length = config.width, config.heads * config.head_size, config.layout.length
    projections = 4 * width * inner + 8 * width**2  # q, k, v and output; up and down, four times as wide
    return 2 * config.num_layers * projections * length + attention(config)


def attention(config: TransformerConfig) -> int:
    """Of all layers' scores and weighted sums for one sequence, forward."""
    kinds = set(config.kinds)
    pairs = {k: int(attention_pattern.allowed(k, text_len=config.text_len, grid=config.grid).sum()) for k in kinds}
    return 4 * config.heads * config.head_size * sum(pairs[kind] for kind in config.kinds)


def transformer_heads(config: TransformerConfig) -> int:
    """Of one sequence's logits, forward: text positions over the text vocabulary, image positions over the image's."""
    layout = config.layout
    return 2 * config.width * layout.logits


def transformer(config: TransformerConfig) -> int:
    """Of one training sequence of the transformer, forward and backward."""
    return TRAINING_PASSES * (transformer_layers(config) + transformer_heads(config))


def recomputed(config: TransformerConfig) -> int:
    """What the backward pass computes again for one sequence, by `config.remat`.

    `attention` computes the scores again, `dots` too (it keeps the projections), `full` everything. A fused kernel
    goes through the scores twice on its way back: seven products, where four would do if they had been kept.
    """
    own = 0 if config.attention == "xla" else 3 * attention(config) // 2
    if config.remat == "none":
        return own
    return own + (transformer_layers(config) if config.remat == "full" else attention(config))


def traced(function, *args: Any) -> int:
    """Of matrix products and convolutions in `function(*args)`, counted in its trace; args may be abstract.

    A loop counts as often as it runs; a branch of a conditional as if it were taken.
    """
    return sum(times * count for times, count, _ in _products(jax.make_jaxpr(function)(*args).jaxpr))


def products(function, *args: Any) -> list[Any]:
    """Abstract results of the matrix products and convolutions in `function(*args)`, in the order of its trace."""
    return [result for _, _, result in _products(jax.make_jaxpr(function)(*args).jaxpr)]


def _products(jaxpr) -> Iterator[tuple[int, int, Any]]:
    """How often, FLOPs and abstract result of each product."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        result = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[i] for i in left)
            yield 1, 2 * math.prod(result.shape) * contracted, result
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channel = params["dimension_numbers"].rhs_spec[0]  # the kernel's dimension of output channels
            yield 1, 2 * math.prod(result.shape) * math.prod(kernel) // kernel[channel], result
        else:
            outer = params["length"] if name == "scan" else 1
            for inner in _inner(params):
                yield from ((outer * times, count, found) for times, count, found in _products(inner))


def _inner(params) -> list:
    """The jaxprs among the parameters of an equation, closed or open, alone or in a tuple."""
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    found = [getattr(value, "jaxpr", value) for value in values]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]
