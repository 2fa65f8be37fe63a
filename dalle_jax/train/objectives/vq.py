"""The objective of an image tokenizer with a codebook: pictures in, how far their reconstructions are off out.

    loss = what the pictures differ by (`Objective.pictures`)  +  the quantizer's terms

For 'nearest' these are the commitment and the codebook's own term (`train/codebook.py`). For 'gumbel' a code is drawn
by the Gumbel-softmax relaxation; forward it is one code, backward the gradient is that of the mixture (taming-
transformers). Its term is kl * KL(q || uniform), the mean over positions. Everything here is float32; batches hold
'image' uint8 [B, H, W, 3].
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax import models, pixels
from dalle_jax.errors import UserError
from dalle_jax.model_dir import TRAINING_PART, ModelDir
from dalle_jax.models import Model, Params, discriminator, lpips
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.model import decode_images, encode_images, last_weight
from dalle_jax.models.vq.quantizer import straight_through
from dalle_jax.sharding import constrain
from dalle_jax.train.adversary import against, beside, made_by
from dalle_jax.train.codebook import Learner
from dalle_jax.train.monitor.rise import Onset
from dalle_jax.train.objectives.code_health import collapse_warning, count_codes, health, usage
from dalle_jax.train.objectives.dvae import kl_to_uniform, relax
from dalle_jax.train.objectives.task import CODE_COUNTS, OBSERVED, Frozen, Memory, Metrics, Task
from dalle_jax.train.settings import TrainSettings, VQObjective

FROZEN = ("lpips",)
OPTIONAL = ("lpips",)
PICTURES = 8  # pictures in a row of `pictures`
CHARBONNIER = 1e-3  # below such differences it is a square, above an absolute value
ADVICE = (
    "lower objective.adversary.weight or max_weight or raise its ramp in a new run; `dalle-jax export --step` takes it"
)
REMEDIES = {
    "nearest": "Codes that start from k-means (objective.codebook.start and kmeans), objective.codebook.dead_below, or "
    "model.unit_codes with a small model.code_dim may help.",
    "gumbel": "A larger objective.kl or a slower objective.temperature may help.",
}


def build(settings: TrainSettings, frozen: Mapping[str, ModelDir]) -> Task:
    """The task of `settings.model` under `settings.objective`.

    Raises:
      UserError: settings of another quantizer, or codes that could not start.
    """
    model = models.build("vq", settings.model)
    objective = _checked(settings)
    judge = onset = None
    if adversary := objective.adversary:
        microbatch, sizes = settings.batch_size // settings.accumulate, settings.model
        adversary.check_fits(microbatch=microbatch, image_size=sizes.image_size, steps=settings.run.steps)
        judge = discriminator.model(adversary.discriminator(sizes.precision))
        model = beside(model, judge.config)
        onset = Onset("reconstruction", adversary.start, what="the adversary's start", advice=ADVICE)
    learner = None
    if objective.codebook is not None:
        learner = Learner(objective.codebook, settings.model, vectors=settings.batch_size * settings.model.grid**2)
        if objective.codebook.start is not None:
            _check_start(learner, steps=settings.run.steps)
    given = frozen.get("lpips")
    if given and settings.model.image_size < lpips.MIN_SIZE:
        raise UserError(
            f"expected pictures of at least {lpips.MIN_SIZE} pixels with config.frozen.lpips, got "
            f"config.model.image_size = {settings.model.image_size}: leave it out, the edge error stands in"
        )
    parts = Objective(model, objective, learner, lpips=given.model if given else None, judge=judge)
    return Task(
        name="vq",
        model=model,
        loss=parts.loss,
        mean_over_examples=False,  # codes learn from the whole batch
        frozen={"lpips": given.params} if given else {},
        pictures=jax.jit(functools.partial(_pictures, model)),
        warn=functools.partial(collapse_warning, remedies=REMEDIES[settings.model.quantizer]),
        memory=learner.memory if learner else None,
        remember=learner.remember if learner else None,
        followed=(("quantizer", "codebook"),) if learner else (),
        health=health,
        onset=onset,
    )


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a model. learner: of its codebook, None for 'gumbel'. lpips: the model of that role, if given. judge:
    the discriminator of an adversary, if there is one, whose parameters are among the model's.
    """

    model: Model
    weights: VQObjective
    learner: Learner | None
    lpips: Model | None = None
    judge: Model | None = None

    def loss(
        self, params: Params, frozen: Frozen, batch, *, key, step, memory: Memory | None = None
    ) -> tuple[jax.Array, Metrics]:
        """`Task.loss`."""
        x_BHWC = pixels.to_range(pixels.to_unit(batch["image"]), self.model.config.pixel_range)
        encoded = self.model.apply(params, x_BHWC, method="encode")
        if self.learner:
            assert memory is not None
            q_BRCD, tokens_BRC, terms, vectors = self.learner.quantize(params, memory, encoded, key=key)
            observed = {"vectors": vectors, "tokens": tokens_BRC}
            started = memory.get("started", True)
            measured = {"quantization_error": jnp.square(q_BRCD - vectors).mean()}
        else:
            q_BRCD, tokens_BRC, terms, measured = self._drawn(params, encoded, key=key, step=step)
            observed, started = {}, True
        difference = functools.partial(self.pictures, x_BHWC, frozen=frozen)
        if self.judge:
            total, value, of_pictures = self._judged(params, x_BHWC, q_BRCD, difference, step=step)
        else:
            value, of_pictures = difference(self.model.apply(params, q_BRCD, method="decode"))
            total = value
        counts_V = jnp.where(started, count_codes(tokens_BRC, self.model.config.vocab), 0)
        return total + sum(terms.values()), {
            "reconstruction": value,
            **of_pictures,
            **terms,
            **measured,
            **usage(counts_V),
            OBSERVED: observed | {CODE_COUNTS: counts_V},
        }

    def _judged(self, params: Params, x_BHWC, q_BRCD, difference, *, step) -> tuple[Any, Any, dict[str, jax.Array]]:
        """The loss of the pictures with the adversary's, their difference alone, and metrics of both."""
        assert self.judge and self.weights.adversary
        judge, pixel_range = self.judge, self.model.config.pixel_range

        def look(params, y_BHWC):
            return judge.apply(params, pixels.to_range(pixels.from_range(y_BHWC, pixel_range), "symmetric"))

        last = last_weight(self.model.config)
        y_BHWC, by_last = made_by(self.model, params, q_BRCD, method="decode", last=last)
        (value, metrics), gradient = jax.value_and_grad(difference, has_aux=True)(jax.lax.stop_gradient(y_BHWC))
        total, of_adversary = against(
            self.weights.adversary,
            look,
            params[TRAINING_PART],
            real=x_BHWC,
            made=y_BHWC,
            by_last=by_last,
            error=value,
            error_gradient=gradient,
            step=step,
        )
        return total, value, metrics | of_adversary

    def pictures(self, x_BHWC, y_BHWC, frozen: Frozen) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted difference of pictures and their reconstructions, both in the model's range, and metrics."""
        weights, d_BHWC = self.weights, y_BHWC - x_BHWC
        x_unit, y_unit = (pixels.from_range(z, self.model.config.pixel_range) for z in (x_BHWC, y_BHWC))
        total = weights.absolute * jnp.abs(d_BHWC).mean()
        total += weights.squared / weights.variance * jnp.square(d_BHWC).mean()
        if weights.charbonnier:
            total += weights.charbonnier * charbonnier(d_BHWC).mean()
        if weights.edges:
            total += weights.edges * edges(d_BHWC)
        metrics = {"squared_error": jnp.square(y_unit.clip(0.0, 1.0) - x_unit).mean()}  # unit range
        if weights.perceptual:
            if self.lpips:
                distance_B = lpips.distance(self.lpips, frozen["lpips"], x_unit, y_unit)
            else:
                distance_B = lpips.edge_error(x_unit, y_unit)
            metrics["perceptual"] = distance_B.mean()
            total += weights.perceptual * metrics["perceptual"]
        return total, metrics

    def _drawn(self, params: Params, logits_BRCK, *, key, step) -> tuple[Any, Any, Any, Any]:
        """Codes that are drawn by their logits, tokens of the largest ones, the loss of the logits, and metrics."""
        temperature = self.weights.temperature(step) if self.weights.temperature else jnp.float32(1.0)
        soft_BRCK = relax(logits_BRCK, temperature, key)
        hard_BRCK = jax.nn.one_hot(jnp.argmax(soft_BRCK, axis=-1), soft_BRCK.shape[-1], dtype=jnp.float32)
        codes_KD = constrain(params["quantizer"]["codebook"], (None, None))
        q_BRCD = jnp.matmul(straight_through(soft_BRCK, hard_BRCK), codes_KD, precision=jax.lax.Precision.HIGHEST)
        kl = kl_to_uniform(logits_BRCK).mean()
        tokens_BRC = jnp.argmax(logits_BRCK, axis=-1).astype(jnp.int32)
        measured = {"kl_nats_per_token": kl, "temperature": temperature}
        return q_BRCD, tokens_BRC, {"kl": self.weights.kl * kl}, measured


def charbonnier(d):
    """sqrt(d^2 + CHARBONNIER^2): an absolute value that is smooth at 0."""
    return jnp.sqrt(jnp.square(d) + CHARBONNIER**2)


def edges(d_BHWC):
    """The mean of `charbonnier` over the differences of neighbors, down and across."""
    down, across = (charbonnier(jnp.diff(d_BHWC, axis=axis)) for axis in (1, 2))
    return (down.sum() + across.sum()) / (down.size + across.size)


def _checked(settings: TrainSettings) -> VQObjective:
    """The objective, which fits the quantizer."""
    assert isinstance(settings.model, VQConfig)  # by its name
    objective, quantizer = settings.objective, settings.model.quantizer
    if not isinstance(objective, VQObjective):
        raise UserError("expected config.objective for an image tokenizer, got none: take it from configs/vq.py")
    for name, wanted in (("codebook", quantizer == "nearest"), ("temperature", quantizer == "gumbel")):
        if (getattr(objective, name) is not None) != wanted:
            raise UserError(
                f"expected {'a' if wanted else 'no'} config.objective.{name} with config.model.quantizer = "
                f"{quantizer}, got {'none' if wanted else 'one'}: take them from one variant of configs/vq.py"
            )
    return objective


def _check_start(learner: Learner, *, steps: int) -> None:
    """Raises UserError where the codes could not start."""
    start = learner.codebook.start
    if start is not None and start >= steps:
        raise UserError(
            f"expected config.objective.codebook.start below config.run.steps = {steps}, got {start}, with which there "
            "would never be codes: change one of them"
        )
    _ = learner.collected  # enough vectors


def _pictures(model: Model, params: Params, frozen: Params, batch, key):
    """uint8 [2, n, H, W, 3]: a row of originals and a row of what their tokens give."""
    del frozen, key
    image_uint8 = batch["image"][:PICTURES]
    return jnp.stack([image_uint8, decode_images(model, params, encode_images(model, params, image_uint8))])
