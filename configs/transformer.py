"""Stage 2, the transformer. Needs a trained dVAE and a tokenizer. Launch:

    dalle-jax train --config configs/transformer.py:12b --config.dvae=runs/dvae --config.tokenizer=tokenizer.model \
        --config.data.train='wds:/data/pairs/*.tar' --workdir runs/transformer
    dalle-jax train --config configs/transformer.py:emoji --config.dvae=runs/dvae --config.tokenizer=tokenizer.model \
        --config.data.train='wds:emoji/train-*.tar' --workdir runs/transformer
    dalle-jax train --config configs/transformer.py:demo --config.dvae=runs/dvae --config.tokenizer=tokenizer.model \
        --workdir runs/transformer

12b     Ramesh et al. 2021, appendix B: 64 layers x 3968, 256 text and 32x32 image tokens
emoji   64x64 real pictures, minutes on a CPU
demo    the 64x64 scenes of `dalle-jax demo`
"""

from ml_collections import ConfigDict

from dalle_jax.configs.base import base
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.models.transformer import TransformerConfig


def _start(model: TransformerConfig, data: DataConfig) -> ConfigDict:
    config = base("transformer", model=model, data=data)
    config.dvae = ""  # workdir or exported model of stage 1
    config.tokenizer = ""  # file, or a folder that holds tokenizer.model
    return config


def paper_12b() -> ConfigDict:
    config = _start(
        TransformerConfig(),
        DataConfig(
            image_size=256,
            augment="transformer",
            bpe_dropout=0.1,
            english_only=True,
            drop_boilerplate=True,
            max_aspect_ratio=2.0,
        ),
    )
    config.steps, config.batch_size = 430_000, 1_024
    optimizer = config.optimizer
    optimizer.update(learning_rate=4.5e-4, b2=0.96, weight_decay=4.5e-2, clip_norm=4.0)
    optimizer.schedule.update(name="plateau", warmup_steps=5_000)
    config.ema.update(decay=0.99, every=25)
    return config


def _small(
    *, data: DataConfig, steps: int, learning_rate: float, save_every: int, picture_every: int, **model
) -> ConfigDict:
    """Four layers of width 128 over an 8x8 grid, with Muon instead of the paper's AdamW: minutes on a CPU."""
    config = _start(
        TransformerConfig(num_layers=4, width=128, grid=8, remat="none", scan=False, precision="fp32", **model), data
    )
    config.steps, config.batch_size = steps, 16
    optimizer = config.optimizer
    optimizer.update(name="muon", learning_rate=learning_rate, b2=0.96, weight_decay=4.5e-2, clip_norm=1.0)
    optimizer.schedule.update(name="warmup_linear", warmup_steps=60)
    config.ema.decay = 0.99
    config.update(validate_every=save_every, picture_every=picture_every, checkpoint_every=save_every)
    return config


def emoji() -> ConfigDict:
    return _small(
        heads=2,
        head_size=64,
        text_len=24,
        text_vocab=2_048,
        image_vocab=512,
        data=DataConfig(image_size=64, augment="transformer", bpe_dropout=0.1),
        steps=2_000,
        learning_rate=4e-3,
        save_every=500,
        picture_every=500,
    )


def demo() -> ConfigDict:
    config = _small(
        heads=4,
        head_size=32,
        text_len=14,
        text_vocab=384,
        image_vocab=128,
        data=DataConfig(image_size=64, augment="centre", threads=1),
        steps=4_000,
        learning_rate=8e-3,
        save_every=1_000,
        picture_every=2_000,
    )
    config.data.update(train="scenes:train@64", validation="scenes:val@64")
    return config


VARIANTS = {"12b": paper_12b, "emoji": emoji, "demo": demo}


def get_config(variant: str = "12b") -> ConfigDict:
    return VARIANTS[variant]()
