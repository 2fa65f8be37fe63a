"""The dVAE's objective: pictures in, evidence bound out (Ramesh et al. 2021, sections 2 and 2.1, appendices A.2, A.3).

    loss = mean over pixel values of -ln p(x | z)  +  beta * (sum over positions of KL(q || uniform)) / pixel values

z is drawn from the encoder's categorical by the Gumbel-softmax relaxation at temperature tau; beta and tau follow
cosine schedules of the step. Everything here is float32; batches hold 'image' uint8 [B, H, W, 3].
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle_jax import models, pixels
from dalle_jax.errors import UserError
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import Model, Params
from dalle_jax.models.dvae import decode_images, encode_images, to_unit
from dalle_jax.train.objectives.code_health import collapse_warning, count_codes, health, usage
from dalle_jax.train.objectives.task import CODE_COUNTS, OBSERVED, Task
from dalle_jax.train.settings import DVAEObjective, TrainSettings

FROZEN = ()
GAUSSIAN_SCALE = 0.1  # standard deviation of 'gaussian', in the logit-Laplace range
HARD_STRIDE = 8  # the hard reconstruction error, a metric only, is measured on every eighth picture
PICTURES = 8  # pictures in a row of `pictures`
REMEDIES = (
    "A larger objective.beta.end or objective.balance, a smaller step size or a slower objective.temperature may help."
)


def build(settings: TrainSettings, frozen: Mapping[str, ModelDir]) -> Task:
    """The task of `settings.model` under `settings.objective`."""
    del frozen
    if not isinstance(settings.objective, DVAEObjective):
        raise UserError("expected config.objective for a dVAE, got none: take it from configs/dvae.py")
    model = models.build("dvae", settings.model)
    return Task(
        name="dvae",
        model=model,
        loss=functools.partial(_loss, model, settings.objective),
        mean_over_examples=False,  # `balance` is of the whole batch, and codes are observed
        pictures=jax.jit(functools.partial(_pictures, model)),
        warn=functools.partial(collapse_warning, remedies=REMEDIES),
        health=health,
    )


def log_logit_laplace(x, mu, log_scale):
    """ln density of x in (0, 1) where logit(x) is Laplace(mu, exp(log_scale)) distributed (appendix A.3)."""
    log_x, log_rest = jnp.log(x), jnp.log1p(-x)
    distance = jnp.abs(log_x - log_rest - mu)
    return -jnp.log(2.0) - log_scale - log_x - log_rest - distance * jnp.exp(-log_scale)


def log_gaussian(x, mu):
    """ln density of x, normal around sigmoid(mu) with standard deviation GAUSSIAN_SCALE."""
    distance = (x - jax.nn.sigmoid(mu)) / GAUSSIAN_SCALE
    return -0.5 * jnp.square(distance) - jnp.log(GAUSSIAN_SCALE) - 0.5 * jnp.log(2.0 * jnp.pi)


def kl_to_uniform(logits):
    """KL(softmax(logits) || uniform) in nats over the last axis, 0 .. ln V."""
    log_q = jax.nn.log_softmax(logits)
    return (jnp.exp(log_q) * log_q).sum(-1) + jnp.log(logits.shape[-1])


def relax(logits, temperature, key):
    """A Gumbel-softmax sample over the last axis: a distribution, one-hot in the limit temperature -> 0."""
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return jax.nn.softmax((logits + noise) / temperature)


def _loss(model: Model, objective: DVAEObjective, params: Params, frozen: Params, batch, *, key, step):
    del frozen
    image_unit = pixels.to_unit(batch["image"])
    x_BHWC = pixels.to_laplace(image_unit)
    logits_BGGV = model.apply(params, x_BHWC, method="encode")
    temperature, beta = objective.temperature(step), objective.beta(step)
    pixel_BHWC = model.apply(params, relax(logits_BGGV, temperature, key), method="decode")

    mu, log_scale = jnp.split(pixel_BHWC, 2, axis=-1)
    gaussian = objective.likelihood == "gaussian"
    nll = -(log_gaussian(x_BHWC, mu) if gaussian else log_logit_laplace(x_BHWC, mu, log_scale)).mean()  # per value
    kl_BGG = kl_to_uniform(logits_BGGV)
    kl = kl_BGG.sum() / x_BHWC.size  # also per pixel value
    loss = nll + beta * kl
    if objective.balance:
        loss = loss + objective.balance * _imbalance(logits_BGGV, x_BHWC)

    ids_BGG = jnp.argmax(logits_BGGV, axis=-1)
    hard_BHWC = model.apply(jax.lax.stop_gradient(params), ids_BGG[::HARD_STRIDE], method="decode_tokens")
    counts_V = count_codes(ids_BGG, logits_BGGV.shape[-1])
    return loss, {
        "reconstruction_nats_per_value": nll,
        "kl_nats_per_token": kl_BGG.mean(),
        "elbo_nats_per_value": -(nll + kl),  # the true bound has beta = 1
        "beta": beta,
        "temperature": temperature,
        "relaxed_error": jnp.square(to_unit(pixel_BHWC) - image_unit).mean(),  # squared, unit range
        "hard_error": jnp.square(to_unit(hard_BHWC) - image_unit[::HARD_STRIDE]).mean(),
        **usage(counts_V),
        OBSERVED: {CODE_COUNTS: counts_V},
    }


def _imbalance(logits_BGGV, x_BHWC):
    """KL in nats from the mean posterior to uniform; a position weighs as the deviation of its pixels from flat."""
    B, G, _, V = logits_BGGV.shape
    patch = x_BHWC.shape[1] // G
    patches = x_BHWC.reshape(B, G, patch, G, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, G, G, patch * patch, 3)
    weight_BGG = patches.std(3).mean(-1)
    mean_V = jnp.einsum("bgh,bghv->v", weight_BGG / (weight_BGG.sum() + 1e-6), jax.nn.softmax(logits_BGGV))
    return (mean_V * jnp.log(mean_V * V + 1e-6)).sum()


def _pictures(model: Model, params: Params, frozen: Params, batch, key):
    """uint8 [2, n, H, W, 3]: a row of originals and a row of their hard reconstructions."""
    del frozen, key
    image_uint8 = batch["image"][:PICTURES]
    ids_BRC = encode_images(model, params, image_uint8)
    return jnp.stack([image_uint8, decode_images(model, params, ids_BRC)])
