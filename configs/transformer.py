"""Stage 2, the transformer. Needs a trained image tokenizer and a text tokenizer. Launch:

    dalle-jax train --config configs/transformer.py:12b --config.frozen.image_tokenizer=runs/dvae \
        --config.tokenizer=tokenizer.model --config.run.data.train='wds:/data/pairs/*.tar' --workdir runs/transformer
    dalle-jax train --config configs/transformer.py:12b_v100 --config.frozen.image_tokenizer=runs/dvae \
        --config.tokenizer=tokenizer.model --config.run.data.train='wds:/data/pairs/*.tar' --workdir runs/transformer
    dalle-jax train --config configs/transformer.py:emoji --config.frozen.image_tokenizer=runs/vq \
        --config.tokenizer=tokenizer.model --config.run.data.train='wds:emoji/train-*.tar' --workdir runs/transformer
    dalle-jax train --config configs/transformer.py:demo --config.frozen.image_tokenizer=runs/dvae \
        --config.tokenizer=tokenizer.model --workdir runs/transformer

12b       Ramesh et al. 2021, appendix B: 64 layers x 3968, 256 text and 32x32 image tokens
12b_v100  the same with the paper's arithmetic and layout, for 128 machines of 8 V100 with 16 GB; docs/numerics.md
5b6       its smaller models of section 2.5 and Table 1: 64 layers x 2688
2b8       64 layers x 1920
1b3       24 layers x 2048, the size of ruDALL-E Malevich
400m      24 layers x 1152
emoji     64x64 real pictures on the tokens of `vq.py:emoji`, an hour on a CPU
demo      the 64x64 scenes of `dalle-jax demo`

12b to 400m have the paper's optimizer, schedule and batch of 1024, which it gives for 12b alone; its bound of 5 on the
second moment comes with `optimizer.moments = paper`, which 12b_v100 alone has.
"""

import dataclasses

from ml_collections import ConfigDict

from dalle_jax.configs.base import PAPER_FILTERS, WATCHED, fields
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.settings import Evaluate, MeshSizes, Run, Sources, TrainSettings

FROZEN = {"image_tokenizer": None}


def _paper(**sizes) -> TrainSettings:
    """The paper's training of a model of these sizes; 12b's where nothing is said."""
    return TrainSettings(
        name="transformer",
        model=TransformerConfig(**sizes),
        frozen=FROZEN,
        data=DataConfig(
            image_size=256,
            augment="transformer",
            bpe_dropout=0.1,
            **PAPER_FILTERS,
        ),
        batch_size=1_024,
        optimizer=Optimizer(
            learning_rate=4.5e-4,
            b2=0.96,
            weight_decay=4.5e-2,
            clip_norm=4.0,
            schedule=Schedule(name="plateau", warmup_steps=5_000),
        ),
        ema=Ema(decay=0.99, every=25),
        run=Run(steps=430_000, evaluate=Evaluate(), **WATCHED),
    )


def _12b_v100() -> TrainSettings:
    """Sections 2.4 and 2.5, appendix E."""
    paper = _paper(precision="fp16-paper")
    return dataclasses.replace(
        paper,
        optimizer=dataclasses.replace(paper.optimizer, moments="paper"),
        compression=Compression(rank=896, format="paper"),
        run=dataclasses.replace(paper.run, offload_ema=True, mesh=MeshSizes(replica=128, fsdp=8)),
    )


def _small(*, data: DataConfig, batch_size: int, learning_rate: float, run: Run, **model) -> TrainSettings:
    """Four layers of width 128 over an 8x8 grid, with Muon instead of the paper's AdamW: minutes on a CPU."""
    return TrainSettings(
        name="transformer",
        model=TransformerConfig(num_layers=4, width=128, grid=8, remat="none", scan=False, precision="fp32", **model),
        frozen=FROZEN,
        data=data,
        batch_size=batch_size,
        optimizer=Optimizer(
            name="muon",
            learning_rate=learning_rate,
            b2=0.96,
            weight_decay=4.5e-2,
            clip_norm=1.0,
            schedule=Schedule(name="warmup_linear", warmup_steps=60),
        ),
        ema=Ema(decay=0.99),
        run=run,
    )


def emoji() -> TrainSettings:
    """Mirrored and shifted pictures, as few are repeated often; some without a caption, which guidance needs."""
    return _small(
        heads=2,
        head_size=64,
        text_len=24,
        text_vocab=2_048,
        image_vocab=1_024,
        data=DataConfig(image_size=64, augment="shift", bpe_dropout=0.1, caption_dropout=0.1),
        batch_size=32,
        learning_rate=4e-3,
        run=Run(steps=4_000, evaluate=Evaluate(), validate_every=500, picture_every=2_000, checkpoint_every=500),
    )


def demo() -> TrainSettings:
    return _small(
        heads=4,
        head_size=32,
        text_len=14,
        text_vocab=384,
        image_vocab=128,
        data=DataConfig(image_size=64, augment="center"),
        batch_size=16,
        learning_rate=8e-3,
        run=Run(
            steps=4_000,
            data=Sources(train="scenes:train@64", validation="scenes:val@64", threads=0),
            evaluate=Evaluate(),
            picture_every=2_000,
        ),
    )


VARIANTS = {
    "12b": _paper,
    "12b_v100": _12b_v100,
    "5b6": lambda: _paper(width=2_688, heads=42),
    "2b8": lambda: _paper(width=1_920, heads=30),
    "1b3": lambda: _paper(num_layers=24, width=2_048, heads=32),
    "400m": lambda: _paper(num_layers=24, width=1_152, heads=18),
    "emoji": emoji,
    "demo": demo,
}


def get_config(variant: str = "12b") -> ConfigDict:
    return fields(VARIANTS[variant]())
