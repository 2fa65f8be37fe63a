"""Preflight of image tokenizers with a perceptual loss and an adversary, whose loss takes gradients itself."""

import dataclasses

import pytest

from dalle_jax.train.settings import load_settings
from tests.support.pods import emulated

SIDE = 64
SMALL = {"model.image_size": SIDE, "data.image_size": SIDE, "model.width": 32, "model.blocks": 1, "model.vocab": 16}
# Inputs, outputs and a part of the side of VGG16's convolutions.
VGG = [(3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 2), (128, 256, 4), *[(256, 256, 4)] * 2]
VGG += [(256, 512, 8), *[(512, 512, 8)] * 2, *[(512, 512, 16)] * 3]
# Inputs, outputs and the side of the results of the discriminator's at 64 pixels.
JUDGE = [(3, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 7), (512, 1, 6)]


def work(**changes):
    settings = load_settings("configs/vq.py:f16").changed(SMALL | changes)
    return dataclasses.replace(emulated(), settings=settings).work


@pytest.mark.slow
def test_what_lpips_and_the_adversary_add_is_counted():
    lpips = sum(2 * 9 * inputs * outputs * (SIDE // part) ** 2 for inputs, outputs, part in VGG)
    judge = sum(2 * 16 * inputs * outputs * side**2 for inputs, outputs, side in JUDGE)
    alone = work(**{"objective.adversary": None}).model_flops
    # Both pictures forward, the reconstruction backward; and gradients by the weights, which the compiler leaves out.
    perceptual = work(**{"objective.adversary": None, "frozen.lpips": "anywhere"}).model_flops
    assert perceptual - alone == pytest.approx(4 * lpips, rel=0.05)
    # Three times forward, and backward by the reconstruction, and twice by the weights and what lies between.
    adversary = work().model_flops
    assert 6 * judge < adversary - alone < 9 * judge
