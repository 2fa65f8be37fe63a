"""The adversarial part of an image tokenizer's training: a discriminator that learns beside it, in one loss.

As VQGAN has it (Esser et al. 2021, equations 5 to 7, and taming-transformers): the discriminator's loss is the hinge of
its logits, and the decoder gets, beside the gradient of its error, that of -mean(D(reconstruction)) times

    weight * min(max_weight, |d error / d W| / (|d generator term / d W| + DELTA)),    W: its last convolution's weight

Both sets of parameters are in one tree and one loss: each part sees the other's through a stopped gradient. One update
computes, before anything reaches the decoder, the two gradients by the image; their sum is then put back in place of
the loss's own (`with_gradient`), so that the decoder is gone through backwards once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.model_dir import TRAINING_PART
from dalle_jax.models import discriminator
from dalle_jax.models.discriminator import NORMS, DiscriminatorConfig
from dalle_jax.models.layers import Model, Params

DELTA = 1e-4  # taming-transformers
MAX_STEPS = 2**31 - 1
METRICS = ("adversary_weight", "generator_loss", "discriminator_loss", "real_logits", "made_logits")
_KEY = "config.objective.adversary"


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The discriminator, when it comes in and what it weighs. Counts are of updates, whatever their microbatches.

    The discriminator learns before its judgment counts, so that the decoder never follows one that knows nothing.
    """

    weight: float = 0.8  # of the generator term
    adaptive: bool = True  # times the ratio of the two gradients; False: times 1
    max_weight: float = 1e4  # upper bound of that ratio
    learns_from: int = 0  # updates before the discriminator's first
    start: int = 10_000  # updates before the first whose generator term counts
    ramp: int = 0  # updates from there in which its weight rises to the whole; 0: whole at once
    width: int = 64  # of the discriminator, and the next two; see `models/discriminator.py`
    layers: int = 3
    norm: str = "batch"

    def __post_init__(self):
        check_number(f"{_KEY}.weight", self.weight, above=0, max=1e6)
        check_number(f"{_KEY}.max_weight", self.max_weight, above=0, max=1e6)
        check_number(f"{_KEY}.learns_from", self.learns_from, min=0, max=MAX_STEPS, whole=True)
        check_number(f"{_KEY}.start", self.start, min=1, max=MAX_STEPS, whole=True)
        check_number(f"{_KEY}.ramp", self.ramp, min=0, max=MAX_STEPS, whole=True)
        check_choice(f"{_KEY}.norm", self.norm, NORMS)
        if self.learns_from >= self.start:
            raise UserError(
                f"expected {_KEY}.learns_from below {_KEY}.start = {self.start}, got {self.learns_from}, with which an "
                "untrained discriminator would lead the decoder: lower it, or start later"
            )
        self.discriminator("fp32")

    def discriminator(self, precision: str) -> DiscriminatorConfig:
        """Its sizes. precision: the tokenizer's; with float16 it computes in float32.

        Raises:
          UserError: impossible ones.
        """
        precision = "bf16" if precision == "bf16" else "fp32"
        try:
            return DiscriminatorConfig(width=self.width, layers=self.layers, norm=self.norm, precision=precision)
        except ValueError as error:
            raise UserError(f"expected a possible {_KEY}, got one where {error}: change it") from error

    def check_fits(self, *, microbatch: int, image_size: int, steps: int) -> None:
        """Refuse what would end in numbers that mean nothing, or in an adversary that never comes in.

        microbatch: pictures whose loss is taken at once, on all devices. image_size: pixels per side. steps: the run's.

        Raises:
          UserError: the discriminator has nothing to average over, no logit, or too late a start.
        """
        if self.norm == "batch" and microbatch < 2:
            raise UserError(
                f"expected at least 2 pictures in a microbatch with {_KEY}.norm = batch, got {microbatch}: set "
                f"--{_KEY}.norm=group, or change config.batch_size or config.accumulate"
            )
        if self.discriminator("fp32").positions(image_size) < 1:
            raise UserError(
                f"expected pictures of which {_KEY}.layers = {self.layers} convolutions of stride 2 leave something, "
                f"got {image_size} pixels: lower it"
            )
        if self.start >= steps:
            raise UserError(
                f"expected {_KEY}.start below config.run.steps = {steps}, got {self.start}, with which the adversary "
                f"never counts: lower it, and {_KEY}.learns_from with it, or train longer"
            )

    def weight_at(self, step) -> jax.Array:
        """The weight in the update after `step` others, without the ratio of gradients: 0 up to `start`."""
        risen = jnp.clip((step - self.start) / self.ramp, 0.0, 1.0) if self.ramp else 1.0
        return jnp.where(step >= self.start, self.weight * risen, 0.0)


def beside(model: Model, config: DiscriminatorConfig) -> Model:
    """The model with a discriminator's parameters among its own, under TRAINING_PART; its methods are the model's, and
    so are the initial values of its parameters."""

    def make(rngs):
        module = model.make(rngs)
        setattr(module, TRAINING_PART, discriminator.Discriminator(config, rngs))
        return module

    return Model(model.config, make)


def hinge_loss(real, fake):
    """The discriminator's loss: half the mean distance of its logits of real pictures to 1 and more, and half that of
    made ones to -1 and less."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def generator_loss(fake):
    """The decoder's term: the lower, the more real its pictures look to the discriminator."""
    return -fake.mean()


def adaptive_ratio(error, generator, max_weight: float):
    """min(max_weight, |error| / (|generator| + DELTA)) of two gradients by the same weight."""
    return jnp.clip(jnp.linalg.norm(error) / (jnp.linalg.norm(generator) + DELTA), 0.0, max_weight)


def made_by(model: Model, params: Params, *args, method: str, last: tuple[str, ...]):
    """The images of a decoder, and the gradient by its last weight of whatever has a given gradient by the images.

    last: path of that weight in params. Only the layer that it belongs to is gone through backwards.

    Returns: images [B, H, W, 3], and the function (gradient [B, H, W, 3]) -> gradient of the weight's shape.
    """
    weight = params
    for key in last:
        weight = weight[key]

    def make(weight):
        return model.apply(_with(params, last, weight), *args, method=method)

    images, backwards = jax.vjp(make, weight)
    return images, lambda gradient: backwards(gradient)[0]


def against(
    adversary: Adversary,
    look: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    *,
    real,
    made,
    by_last: Callable[[jax.Array], jax.Array],
    error: jax.Array,
    error_gradient,
    step,
):
    """The loss of a tokenizer with its adversary, but for what does not pass the images; and metrics.

    look: (parameters of the discriminator, images) -> logits. params: those parameters. real, made: images [B, H, W, 3]
    in one range. by_last: of `made_by`. error: float32 scalar, of `made` without the adversary, and its gradient by
    them. step: updates already made.

    Returns: a loss whose gradients are those of error + weight * generator term by what made the images, and those of
    the hinge loss by `params`; and the metrics 'adversary_weight' (the whole factor of the generator term),
    'generator_loss', 'discriminator_loss', and the mean logits 'real_logits' and 'made_logits', all 0 until the
    discriminator learns.
    """
    real, seen, error_gradient = jax.lax.stop_gradient((real, made, error_gradient))

    def apart(_):
        return jnp.zeros([]), error_gradient, dict.fromkeys(METRICS, jnp.zeros([]))

    def together(params):
        fixed = jax.lax.stop_gradient(params)
        generator, gradient = jax.value_and_grad(lambda images: generator_loss(look(fixed, images)))(seen)
        weight = adversary.weight_at(step)
        if adversary.adaptive:
            weight *= adaptive_ratio(by_last(error_gradient), by_last(gradient), adversary.max_weight)
        real_logits, made_logits = look(params, real), look(params, seen)
        hinge = hinge_loss(real_logits, made_logits)
        numbers = (weight, generator, hinge, real_logits.mean(), made_logits.mean())
        measured = dict(zip(METRICS, numbers, strict=True))
        return hinge, *jax.lax.stop_gradient((error_gradient + weight * gradient, measured))

    hinge, gradient, measured = jax.lax.cond(step >= adversary.learns_from, together, apart, params)
    value = jax.lax.stop_gradient(error) + measured["adversary_weight"] * measured["generator_loss"]
    return with_gradient(made, value, gradient) + hinge, measured


@jax.custom_vjp
def with_gradient(x, value, gradient):
    """The scalar `value`, whose gradient by x is `gradient`, an array of x's shape."""
    return value


def _with_gradient_forward(x, value, gradient):
    return value, gradient


def _with_gradient_backward(gradient, cotangent):
    return cotangent * gradient, None, None


with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _with(tree: Params, path: tuple[str, ...], value) -> Params:
    """The tree with another value at a path."""
    key, *rest = path
    return {**tree, key: _with(tree[key], tuple(rest), value) if rest else value}
