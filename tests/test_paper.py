"""Numbers of the papers once more, as literals: a config or a default that leaves one is noticed.

Ramesh et al. 2021 unless another is named. Formulas and networks are tested where they are; `tests/mutations.py` shows
that each number is held by a test.
"""

import argparse
import math
import re

import pytest

from dalle_jax import config
from dalle_jax.cli import tokenizer
from dalle_jax.models.clip import INITIAL_LOG_SCALE, MAX_LOG_SCALE, CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.sample.autoregressive import OPTIONS
from dalle_jax.train.optimizer.schedule import Plateau
from dalle_jax.train.settings import MeshSizes, load_settings
from tests.support import ROOT


def adam_of(settings):
    """Name, b1, b2, epsilon, decay, peak of the step size and bound of the norm."""
    o = settings.optimizer
    return o.name, o.b1, o.b2, o.eps, o.weight_decay, o.learning_rate, o.clip_norm


# Appendix C; that fewer than two words are too short is our reading.
FILTERS = {"min_caption_words": 2, "english_only": True, "drop_boilerplate": True, "max_aspect_ratio": 2.0}


def filters_of(data):
    return {name: getattr(data, name) for name in FILTERS}


# Name -> layers, width, heads. Table 1 has the widths of the first four; 12 layers x width^2 give their 64 layers.
SIZES = {
    "12b": (64, 3968, 62), "12b_v100": (64, 3968, 62), "5b6": (64, 2688, 42), "2b8": (64, 1920, 30),
    "1b3": (24, 2048, 32), "400m": (24, 1152, 18),
}  # fmt: skip


def test_the_vocabulary():
    """Section 2.2."""
    parser = argparse.ArgumentParser()
    tokenizer.add_arguments(parser)
    assert parser.get_default("vocab_size") == 16_384


@pytest.mark.parametrize("name", SIZES)
def test_transformers(name):
    """Sections 2.2 and 2.3, appendices B and C."""
    settings = load_settings(f"configs/transformer.py:{name}")
    model, schedule, data = settings.model, settings.optimizer.schedule, settings.data
    assert (model.num_layers, model.width, model.heads, model.head_size) == (*SIZES[name], 64)
    assert (model.text_len, model.text_vocab, model.grid, model.image_vocab) == (256, 16_384, 32, 8_192)
    assert (model.pattern, model.remat) == ("paper", "full")
    assert (settings.run.steps, settings.batch_size) == (430_000, 1_024)
    assert adam_of(settings) == ("adamw", 0.9, 0.96, 1e-8, 4.5e-2, 4.5e-4, 4.0)
    assert (schedule.name, schedule.warmup_steps) == ("plateau", 5_000)
    assert (settings.ema.decay, settings.ema.every) == (0.99, 25)
    assert (data.image_size, data.augment, data.bpe_dropout) == (256, "transformer", 0.1)
    assert filters_of(data) == FILTERS


def test_the_plateaus():
    """Five halvings, to 1/32; when the loss stands still is our reading."""
    assert Plateau() == Plateau(window=1_000, patience=10, min_improvement=1e-3, halvings=5)


def test_the_transformer_as_it_was_trained():
    """Sections 2.4 and 2.5, appendix E, table 1: 128 machines of 8 GPUs."""
    settings = load_settings("configs/transformer.py:12b_v100")
    assert (settings.model.precision, settings.optimizer.moments) == ("fp16-paper", "paper")
    assert (settings.compression.rank, settings.compression.format) == (896, "paper")
    assert settings.run.mesh == MeshSizes(replica=128, fsdp=8) and settings.run.offload_ema


def test_the_dvae():
    """Section 2.1, appendix A.2; the released code."""
    settings = load_settings("configs/dvae.py:paper")
    schedule, data, model = settings.optimizer.schedule, settings.data, settings.model
    sizes = model.image_size, model.vocab, model.width, model.groups, model.blocks_per_group
    assert sizes == (256, 8_192, 256, 4, 2) and (model.stem, model.stem_kernel, model.patch) == (128, 7, 1)
    assert model.logits_norm == 0
    assert (settings.run.steps, settings.batch_size) == (3_000_000, 512)
    assert (settings.ema.decay, settings.ema.every) == (0.999, 1)
    assert adam_of(settings) == ("adamw", 0.9, 0.999, 1e-8, 1e-4, 1e-4, None)
    assert (schedule.name, schedule.warmup_steps) == ("cosine", 0)
    assert (schedule.decay_steps, schedule.end_learning_rate) == (1_200_000, 1.25e-6)
    assert (settings.objective.likelihood, settings.objective.balance) == ("logit_laplace", 0)
    assert (data.image_size, data.augment) == (256, "dvae")
    assert filters_of(data) == FILTERS  # the same data


def test_defaults_of_the_models_are_the_papers():
    assert TransformerConfig() == load_settings("configs/transformer.py:12b").model
    sizes = [getattr(DVAEConfig(), name) for name in ("image_size", "vocab", "width", "stem", "stem_kernel")]
    assert sizes == [256, 8_192, 256, 128, 7]


# Radford et al. 2021, tables 18 to 20: name -> embedding, patch; layers, width and heads of images, width and heads of
# captions; step size.
CLIPS = {
    "b32": (512, 32, (12, 768, 12), (512, 8), 5e-4),
    "b16": (512, 16, (12, 768, 12), (512, 8), 5e-4),
    "l14": (768, 14, (24, 1024, 16), (768, 12), 4e-4),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name):
    embed, patch, image, text, rate = CLIPS[name]
    settings = load_settings(f"configs/clip.py:{name}")
    model, schedule = settings.model, settings.optimizer.schedule
    assert (model.embed, model.image_size, model.patch) == (embed, 224, patch)
    assert (model.image_layers, model.image_width, model.image_heads) == image
    assert (model.text_layers, model.text_width, model.text_heads) == (12, *text)
    assert (model.text_len, model.layout.text_ids) == (77, 49_408)
    assert model.remat == "full"  # section 2.5
    assert (settings.run.steps * settings.batch_size, settings.batch_size) == (32 * 400_000_000, 32_768)
    assert adam_of(settings) == ("adamw", 0.9, 0.98, 1e-6, 0.2, rate, None) and settings.optimizer.decay_tables
    assert (schedule.name, schedule.warmup_steps, schedule.end_learning_rate) == ("warmup_cosine", 2_000, 0)
    assert (settings.data.image_size, settings.data.augment) == (224, "clip")


def test_clips_scale_and_pixels():
    """Section 2.5, and the released preprocessing."""
    assert INITIAL_LOG_SCALE == math.log(1 / 0.07) and math.isclose(MAX_LOG_SCALE, math.log(100))
    assert CLIPConfig().mean == (0.48145466, 0.4578275, 0.40821073)
    assert CLIPConfig().std == (0.26862954, 0.26130258, 0.27577711)


def test_samples_are_drawn_as_in_the_paper():
    """Section 2.6: temperature 1, of all codes."""
    defaults = {option.name: option.default for option in OPTIONS}
    assert (defaults["temperature"], defaults["top_k"], defaults["top_p"]) == (1.0, None, None)


@pytest.mark.parametrize(("name", "crop", "side"), [("coco", "center", 256), ("dm-gan", "none", None)])
def test_the_evaluation(name, crop, side):
    """Sections 2.6 and 3.1, figure 9; the crop is Nichol et al. 2021, appendix A.2."""
    found = config.load(f"configs/evaluate.py:{name}")
    assert (found.draw.count, found.draw.best_of, found.reference_exactly) == (30_000, 512, 40_504)
    assert tuple(found.measure.blur) == (0.0, 1.0, 2.0, 4.0, 8.0)
    assert (found.measure.crop, found.measure.side) == (crop, side)
    assert (found.measure.pools, found.measure.resize) == ("torchvision", "dm-gan")
    cub = config.load("configs/evaluate.py:cub").draw
    assert (cub.count, cub.unique, cub.best_of) == (None, True, 512)


def test_no_fact_is_silent():
    """Each is exact, a departure or a reading, and names where it is or what holds it."""
    table = (ROOT / "docs" / "paper.md").read_text().partition("## Every fact")[2]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| ")][1:]
    facts = [row for row in rows if not row[0].startswith("| **")]
    assert len(facts) >= 140
    for fact in facts:
        assert len(fact) == 4 and all(fact), fact
        assert re.match(r"exact\b|departs: |open: ", fact[2]), fact
