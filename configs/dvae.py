"""Stage 1, the discrete VAE. Launch:

    dalle-jax train --config configs/dvae.py:paper --config.run.data.train='wds:/data/pairs/*.tar' --workdir runs/dvae
    dalle-jax train --config configs/dvae.py:emoji --config.run.data.train='wds:emoji/train-*.tar' --workdir runs/dvae
    dalle-jax train --config configs/dvae.py:demo --workdir runs/dvae

paper   Ramesh et al. 2021, appendix A.2: 97.6 million parameters, 256x256 pictures, 32x32 codes out of 8192
emoji   64x64 real pictures (emoji, icons, thumbnails), 8x8 codes out of 512, minutes on a CPU
demo    the 64x64 scenes of `dalle-jax demo`, 8x8 codes out of 128
"""

from ml_collections import ConfigDict

from dalle_jax.configs.base import PAPER_FILTERS, WATCHED, fields
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.settings import Cosine, DVAEObjective, Run, Sources, TrainSettings


def paper() -> TrainSettings:
    return TrainSettings(
        name="dvae",
        model=DVAEConfig(precision="bf16"),  # of the branches; V100s take the paper's fp16-global
        objective=DVAEObjective(),
        data=DataConfig(image_size=256, augment="dvae", **PAPER_FILTERS),
        batch_size=512,
        optimizer=Optimizer(
            learning_rate=1e-4,
            weight_decay=1e-4,
            schedule=Schedule(name="cosine", decay_steps=1_200_000, end_learning_rate=1.25e-6),
        ),
        ema=Ema(decay=0.999),
        run=Run(steps=3_000_000, **WATCHED),
    )


def _small(*, data: DataConfig, learning_rate: float, cooling_steps: int, run: Run, **model) -> TrainSettings:
    """64x64 flat graphics on few positions: what the paper does not use is set here, by name."""
    return TrainSettings(
        name="dvae",
        model=DVAEConfig(image_size=64, stem=128, blocks_per_group=1, logits_norm=3.0, **model),
        objective=DVAEObjective(
            beta=Cosine(0.0, 0.05, 300),
            temperature=Cosine(1.0, 0.3, cooling_steps),
            likelihood="gaussian",
            balance=0.1,
        ),
        data=data,
        batch_size=32,
        optimizer=Optimizer(
            learning_rate=learning_rate,
            b2=0.99,
            weight_decay=1e-4,
            clip_norm=1.0,
            schedule=Schedule(name="warmup_cosine", warmup_steps=50, end_learning_rate=learning_rate / 50),
        ),
        ema=Ema(decay=0.99),
        run=run,
    )


def emoji() -> TrainSettings:
    return _small(
        vocab=512,
        width=64,
        groups=2,
        stem_kernel=3,
        patch=4,
        data=DataConfig(image_size=64, augment="dvae"),
        learning_rate=4e-3,
        cooling_steps=1_200,
        run=Run(steps=1_500, validate_every=500, picture_every=500, checkpoint_every=500),
    )


def demo() -> TrainSettings:
    return _small(
        vocab=128,
        width=128,
        groups=1,
        stem_kernel=1,
        patch=8,
        data=DataConfig(image_size=64, augment="center"),
        learning_rate=6e-3,
        cooling_steps=800,
        run=Run(
            steps=1_000, data=Sources(train="scenes:train@64", validation="scenes:val@64", threads=1), picture_every=500
        ),
    )


VARIANTS = {"paper": paper, "emoji": emoji, "demo": demo}


def get_config(variant: str = "paper") -> ConfigDict:
    return fields(VARIANTS[variant]())
