"""Numbers of VQ-VAE and VQGAN once more, as literals: a config or a default that leaves one is noticed.

Van den Oord et al. 2017 and DeepMind's example of it (sonnet), Esser et al. 2021 and taming-transformers' configs.
"""

import pytest

from dalle_jax.models.vq.config import VQConfig
from dalle_jax.train.adversary import DELTA, Adversary
from dalle_jax.train.codebook import Codebook
from dalle_jax.train.objectives.vq import CHARBONNIER
from dalle_jax.train.settings import load_settings


def settings_of(variant):
    return load_settings(f"configs/vq.py:{variant}")


def network_of(model):
    """Side of a picture and of its codes, codes, their numbers, width of each level, blocks of each."""
    return model.image_size, model.grid, model.vocab, model.code_dim, model.widths, model.blocks


def adam_of(settings):
    o = settings.optimizer
    return o.b1, o.b2, o.weight_decay, o.clip_norm, o.schedule.name, o.schedule.warmup_steps


def test_deepminds_example():
    settings = settings_of("vqvae_cifar")
    assert network_of(settings.model) == (32, 8, 512, 64, (64, 128), 2)
    assert settings.model.network == "vqvae" and settings.model.pixel_range == "centered"
    assert (settings.batch_size, settings.run.steps, settings.optimizer.learning_rate) == (32, 10_000, 3e-4)
    assert adam_of(settings) == (0.9, 0.999, 0.0, None, "warmup_constant", 0)
    codebook, objective = settings.objective.codebook, settings.objective
    assert (codebook.rule, codebook.commitment, codebook.decay, codebook.epsilon) == ("ema", 0.25, 0.99, 1e-5)
    assert codebook.start is None and codebook.dead_below is None
    assert (objective.absolute, objective.squared, objective.perceptual) == (0.0, 1.0, 0.0)
    assert objective.variance == pytest.approx(0.0633, abs=1e-3)


def test_the_larger_vqvae_is_as_wide_as_the_dvaes_grid():
    settings, dvae = settings_of("vqvae"), load_settings("configs/dvae.py:paper")
    assert network_of(settings.model) == (256, 32, 8_192, 64, (128, 256, 256), 2)
    assert (settings.model.vocab, settings.model.grid) == (dvae.model.vocab, dvae.model.grid)
    assert settings.data == dvae.data and settings.batch_size == dvae.batch_size


# Name -> codes, numbers of a code, channels of the latent, widths, levels with attention, side of the grid.
VQGANS = {
    "f16": (16_384, 256, 256, (128, 128, 256, 256, 512), (4,), 16),
    "f8": (16_384, 4, 4, (128, 256, 256, 512), (3,), 32),
    "gumbel_f8": (8_192, 256, 256, (128, 128, 256, 512), (3,), 32),
}


@pytest.mark.parametrize("name", VQGANS)
def test_vqgans(name):
    settings = settings_of(name)
    model, adversary, objective = settings.model, settings.objective.adversary, settings.objective
    found = model.vocab, model.code_dim, model.latent, model.widths, model.attention_levels, model.grid
    assert found == VQGANS[name] and model.network == "vqgan" and model.blocks == 2 and model.image_size == 256
    assert settings.optimizer.learning_rate == pytest.approx(4.5e-6 * settings.batch_size)
    assert adam_of(settings) == (0.5, 0.9, 0.0, None, "warmup_constant", 0)
    assert (objective.absolute, objective.squared, objective.perceptual) == (1.0, 0.0, 1.0)
    assert (adversary.weight, adversary.adaptive, adversary.max_weight, adversary.start) == (0.8, True, 1e4, 250_000)
    assert (adversary.width, adversary.layers, adversary.norm) == (64, 3, "batch") and DELTA == 1e-4
    if name == "gumbel_f8":
        assert objective.codebook is None and objective.kl == 5e-4 and model.quantizer == "gumbel"
        temperature = objective.temperature
        assert (temperature.start, temperature.end, temperature.steps) == (1.0, 1 / 16, 150_000)
    else:
        codebook = objective.codebook
        assert (codebook.rule, codebook.commitment, codebook.codebook_weight) == ("loss", 0.25, 1.0)


def test_flat_graphics():
    """Not published numbers, but those that docs/tokenizers.md was measured with."""
    settings = settings_of("emoji")
    codebook, objective, model = settings.objective.codebook, settings.objective, settings.model
    assert network_of(model) == (64, 8, 1_024, 16, (64, 128), 2)
    assert (model.network, model.patch, model.unit_codes, model.pixel_range) == ("patches", 4, True, "unit")
    assert (codebook.decay, codebook.start, codebook.noise, codebook.kmeans) == (0.98, 1_080, 0.3, True)
    assert (codebook.dead_below, codebook.dead_every) == (0.1, 50)
    assert (objective.squared, objective.charbonnier, objective.edges, CHARBONNIER) == (1.0, 1.0, 0.5, 1e-3)
    assert settings.optimizer.learning_rate == 2e-3 and settings.optimizer.b2 == 0.99 and settings.ema.decay == 0.99


def test_defaults():
    """Of what a config leaves out: f16 and the discriminator of taming-transformers, the codes of DeepMind."""
    model = VQConfig()
    assert (model.vocab, model.code_dim, model.latent, model.widths) == (16_384, 256, 256, (128, 128, 256, 256, 512))
    assert (Adversary().weight, Adversary().start, Adversary().learns_from) == (0.8, 10_000, 0)
    assert (Codebook().commitment, Codebook().decay, Codebook().codebook_weight) == (0.25, 0.99, 1.0)
