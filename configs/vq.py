"""Stage 1, image tokenizers with a codebook of vectors: VQ-VAE and VQGAN. Launch:

    dalle-jax train --config configs/vq.py:f16 --config.run.data.train='wds:/data/pairs/*.tar' --workdir runs/f16
    dalle-jax train --config configs/vq.py:emoji --config.run.data.train='wds:emoji/train-*.tar' --workdir runs/vq
    dalle-jax train --config configs/vq.py:demo --workdir runs/vq

vqvae_cifar  DeepMind's example of van den Oord et al. 2017: 32x32 pictures, 8x8 codes out of 512
vqvae        the same network with the sizes of `dvae.py:paper`: 256x256 pictures, 32x32 codes out of 8192
f8           VQGAN (Esser et al. 2021), 32x32 codes out of 16384
f16          VQGAN, 16x16 codes out of 16384
gumbel_f8    VQGAN with Gumbel-softmax, 32x32 codes out of 8192
emoji        64x64 real pictures (emoji, icons, thumbnails), 8x8 codes out of 1024, an hour on a CPU
demo         the 64x64 scenes of `dalle-jax demo`, 8x8 codes out of 128

The VQGANs' perceptual loss wants LPIPS, `--config.frozen.lpips=DIR` of `dalle-jax convert lpips`; without it an edge
error stands in. Their adversary counts from update 250,000 on; for few pictures or a trial lower
`--config.objective.adversary.start` and `.learns_from` (taming-transformers: 10,000 for pictures of one's own).
"""

from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configs.base import PAPER_FILTERS, WATCHED, fields
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.train.adversary import Adversary
from dalle_jax.train.codebook import Codebook
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.settings import Cosine, Run, Sources, TrainSettings, VQObjective

# Of the training pictures' values in [0, 1]: from the means (.4914, .4822, .4465) and deviations (.2470, .2435, .2616)
# of their colors, which everybody publishes.
CIFAR_VARIANCE = 0.0633
CONSTANT = Schedule(name="warmup_constant", warmup_steps=0)
# taming-transformers' for ImageNet, whose discriminator begins to learn when it begins to count; 10,000 updates are
# ours, and so is the ramp.
ADVERSARY = Adversary(weight=0.8, learns_from=240_000, start=250_000, ramp=10_000)


def vqvae_cifar() -> TrainSettings:
    """The numbers of DeepMind's example (sonnet/examples/vqvae_example.ipynb): its EMA codebook. Give your CIFAR-10 as
    `--config.run.data.train=tfds:cifar10`."""
    return TrainSettings(
        name="vq",
        model=VQConfig(
            image_size=32,
            vocab=512,
            code_dim=64,
            network="vqvae",
            width=64,
            multipliers=(1, 2),
            pixel_range="centered",
        ),
        objective=VQObjective(absolute=0.0, squared=1.0, variance=CIFAR_VARIANCE, perceptual=0.0, codebook=Codebook()),
        data=DataConfig(image_size=32, augment="center"),
        batch_size=32,
        optimizer=Optimizer(learning_rate=3e-4, b2=0.999, weight_decay=0.0, clip_norm=None, schedule=CONSTANT),
        run=Run(steps=10_000),
    )


def vqvae() -> TrainSettings:
    """Data and batch size of `dvae.py:paper`; the VQ-VAE of the paper for ImageNet has 32x32 codes too, out of 512.

    The variance is a scale of the loss beside the commitment; that of photos is near CIFAR's.
    """
    return TrainSettings(
        name="vq",
        model=VQConfig(
            vocab=8_192,
            code_dim=64,
            network="vqvae",
            multipliers=(1, 2, 2),
            pixel_range="centered",
            precision="bf16",
        ),
        objective=VQObjective(
            absolute=0.0,
            squared=1.0,
            variance=CIFAR_VARIANCE,
            perceptual=0.0,
            codebook=Codebook(dead_below=0.1),
        ),
        data=DataConfig(image_size=256, augment="dvae", **PAPER_FILTERS),
        batch_size=512,
        optimizer=Optimizer(learning_rate=3e-4, b2=0.999, weight_decay=0.0, clip_norm=1.0, schedule=CONSTANT),
        run=Run(steps=250_000, **WATCHED),
    )


def _vqgan(*, batch_size: int, objective: VQObjective, **model: Any) -> TrainSettings:
    """taming-transformers' training. Its step size is 4.5e-6 for each picture of a batch."""
    return TrainSettings(
        name="vq",
        model=VQConfig(precision="bf16", **model),
        objective=objective,
        data=DataConfig(image_size=256, augment="dvae", **PAPER_FILTERS),
        batch_size=batch_size,
        optimizer=Optimizer(
            learning_rate=4.5e-6 * batch_size, b1=0.5, b2=0.9, weight_decay=0.0, clip_norm=None, schedule=CONSTANT
        ),
        frozen={"lpips": None},
        run=Run(steps=500_000, **WATCHED),
    )


def f16() -> TrainSettings:
    return _vqgan(batch_size=96, objective=VQObjective(adversary=ADVERSARY, codebook=Codebook(rule="loss")))


def f8() -> TrainSettings:
    """The network of latent-diffusion's `vq-f8`: codes of 4 numbers."""
    return _vqgan(
        batch_size=96,
        objective=VQObjective(adversary=ADVERSARY, codebook=Codebook(rule="loss")),
        code_dim=4,
        latent=4,
        multipliers=(1, 2, 2, 4),
        attention_levels=(3,),
    )


def gumbel_f8() -> TrainSettings:
    """The temperature falls as the dVAE's does (Ramesh et al. 2021, appendix A.2)."""
    objective = VQObjective(adversary=ADVERSARY, temperature=Cosine(1.0, 1 / 16, 150_000), kl=5e-4)
    return _vqgan(
        batch_size=96,
        objective=objective,
        vocab=8_192,
        multipliers=(1, 1, 2, 4),
        attention_levels=(3,),
        quantizer="gumbel",
    )


def _small(*, vocab: int, blocks: int, start: int, data: DataConfig, run: Run) -> TrainSettings:
    """64x64 flat graphics on 8x8 codes of 16 numbers: the recipe that wins on emoji (docs/tokenizers.md)."""
    return TrainSettings(
        name="vq",
        model=VQConfig(
            image_size=64,
            vocab=vocab,
            code_dim=16,
            network="patches",
            width=64,
            multipliers=(1, 2),
            blocks=blocks,
            patch=4,
            unit_codes=True,
            pixel_range="unit",
        ),
        objective=VQObjective(
            absolute=0.0,
            squared=1.0,
            charbonnier=1.0,
            edges=0.5,
            perceptual=0.0,
            codebook=Codebook(
                commitment=0.05, decay=0.98, start=start, noise=0.3, kmeans=True, dead_below=0.1, dead_every=50
            ),
        ),
        data=data,
        batch_size=32,
        optimizer=Optimizer(
            learning_rate=2e-3,
            b2=0.99,
            weight_decay=0.0,
            clip_norm=1.0,
            schedule=Schedule(name="warmup_cosine", warmup_steps=50),
        ),
        ema=Ema(decay=0.99),
        run=run,
    )


def emoji() -> TrainSettings:
    """The first 12 % of the 9,000 updates have no codes."""
    return _small(
        vocab=1_024,
        blocks=2,
        start=1_080,
        data=DataConfig(image_size=64, augment="shift"),
        run=Run(steps=9_000, validate_every=1_000, picture_every=1_000, checkpoint_every=1_000),
    )


def demo() -> TrainSettings:
    return _small(
        vocab=128,
        blocks=1,
        start=120,
        data=DataConfig(image_size=64, augment="center"),
        run=Run(
            steps=1_000, data=Sources(train="scenes:train@64", validation="scenes:val@64", threads=1), picture_every=500
        ),
    )


VARIANTS = {
    "vqvae_cifar": vqvae_cifar,
    "vqvae": vqvae,
    "f8": f8,
    "f16": f16,
    "gumbel_f8": gumbel_f8,
    "emoji": emoji,
    "demo": demo,
}


def get_config(variant: str = "f16") -> ConfigDict:
    return fields(VARIANTS[variant]())
