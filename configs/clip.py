"""CLIP, which ranks samples. Needs a tokenizer. Launch:

    dalle-jax tokenizer 'wds:/data/pairs/*.tar' --vocab-size 49406 --out runs/clip_tokenizer
    dalle-jax train --config configs/clip.py:b32 --config.tokenizer=runs/clip_tokenizer \
        --config.run.data.train='wds:/data/pairs/*.tar' --workdir runs/clip
    dalle-jax train --config configs/clip.py:demo --config.tokenizer=tokenizer.model --workdir runs/clip

b32     ViT-B/32 of Radford et al. 2021, tables 19 and 20: 12 layers x 768, patches of 32 pixels
b16     ViT-B/16: the same with patches of 16 pixels
l14     ViT-L/14: 24 layers x 1024, patches of 14 pixels
demo    the 64x64 scenes of `dalle-jax demo`, a minute or two on a CPU

b32 to l14 have the paper's batch of 32,768, AdamW and schedule: 32 epochs of 400 million pairs are 390,625 updates.
Half precision is bfloat16 here, gradients are checkpointed as in the paper. Adam's moments are float32 and the paper's
of half precision: `config.optimizer.moments=bf16` keeps those of the blocks so. `config.accumulate` stays 1: a batch in
parts would have other negatives.
"""

from ml_collections import ConfigDict

from dalle_jax.configs.base import WATCHED, fields
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.settings import Run, Sources, TrainSettings


def _paper(*, learning_rate: float = 5e-4, **sizes) -> TrainSettings:
    """The paper's training of a vision transformer of these sizes, its tables 18 to 20."""
    return TrainSettings(
        name="clip",
        model=CLIPConfig(precision="bf16", remat="full", **sizes),
        data=DataConfig(image_size=224, augment="clip", drop_boilerplate=True),
        batch_size=32_768,
        optimizer=Optimizer(
            learning_rate=learning_rate,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.2,
            decay_tables=True,  # section 2.5: all weights but gains and biases
            schedule=Schedule(name="warmup_cosine", warmup_steps=2_000),
        ),
        run=Run(steps=390_625, **WATCHED),
    )


def l14() -> TrainSettings:
    return _paper(
        learning_rate=4e-4,
        embed=768,
        patch=14,
        image_layers=24,
        image_width=1_024,
        image_heads=16,
        text_width=768,
        text_heads=12,
    )


def demo() -> TrainSettings:
    return TrainSettings(
        name="clip",
        model=CLIPConfig(
            embed=64,
            image_size=64,
            patch=16,  # most objects lie in one to four patches; a quarter of the tokens that patches of 8 make
            image_layers=2,
            image_width=96,
            image_heads=4,
            text_len=15,
            text_vocab=384,
            text_layers=2,
            text_width=96,
            text_heads=4,
            scan=False,
        ),
        data=DataConfig(image_size=64, augment="center"),
        batch_size=128,
        optimizer=Optimizer(
            name="muon",
            learning_rate=8e-3,
            b2=0.96,
            weight_decay=4.5e-2,
            decay_tables=True,
            clip_norm=1.0,
            schedule=Schedule(name="warmup_linear", warmup_steps=30),
        ),
        ema=Ema(decay=0.98),
        run=Run(
            steps=600,
            data=Sources(train="scenes:train@64", validation="scenes:val@64", threads=0),
            validate_every=300,
            validation_batches=4,
            picture_every=None,
            checkpoint_every=300,
        ),
    )


VARIANTS = {"b32": _paper, "b16": lambda: _paper(patch=16), "l14": l14, "demo": demo}


def get_config(variant: str = "b32") -> ConfigDict:
    return fields(VARIANTS[variant]())
