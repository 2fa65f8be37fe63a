"""The sizes of image tokenizers with a codebook: what they imply, and which are refused; and the ranges of pixels."""

import numpy as np
import pytest

from dalle_jax import pixels
from dalle_jax.models.vq.config import VQConfig


@pytest.mark.parametrize(
    ("sizes", "stride", "grid"),
    [
        ({}, 16, 16),
        ({"multipliers": (1, 2, 2, 4), "attention_levels": (3,)}, 8, 32),
        ({"multipliers": (1, 2, 4), "attention_levels": (), "image_size": 48}, 4, 12),
        ({"network": "vqvae", "width": 64, "multipliers": (1, 2), "image_size": 32}, 4, 8),
        ({"network": "vqvae", "multipliers": (1, 1, 1)}, 8, 32),
        ({"network": "patches", "width": 64, "multipliers": (1, 2), "patch": 4, "image_size": 64}, 8, 8),
        ({"network": "patches", "width": 64, "multipliers": (1,), "patch": 4, "image_size": 64}, 4, 16),
    ],
)
def test_stride_and_grid_follow_from_the_levels(sizes, stride, grid):
    config = VQConfig(**sizes)
    assert (config.stride, config.grid) == (stride, grid)


@pytest.mark.parametrize("network", ["vqgan", "vqvae", "patches"])
def test_lists_from_json_are_the_same_sizes(network):
    listed = VQConfig(network=network, multipliers=[1, 1, 2, 2, 4], attention_levels=[4])
    assert listed == VQConfig(network=network) and hash(listed) == hash(VQConfig(network=network))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 250}, "image_size must be a multiple of the stride 16"),
        ({"vocab": 0}, "vocab"),
        ({"code_dim": 1.5}, "code_dim"),
        ({"network": "vae"}, "network must be one of"),
        ({"quantizer": "soft"}, "quantizer must be one of"),
        ({"pixel_range": "byte"}, "pixel_range must be one of"),
        ({"unit_codes": "yes"}, "unit_codes"),
        ({"unit_codes": True, "quantizer": "gumbel"}, "unit_codes must be False"),
        ({"width": 48}, "multiples of 32"),
        ({"multipliers": ()}, "multipliers must be 1 to 16 numbers"),
        ({"multipliers": (1,) * 17, "attention_levels": (), "image_size": 65_536}, "multipliers must be 1 to 16"),
        ({"multipliers": (1, 0)}, "multipliers must be whole numbers of at least 1"),
        ({"multipliers": (1, 1.5)}, "multipliers must be whole numbers"),
        ({"multipliers": 4}, "multipliers must be several numbers"),
        ({"attention_levels": (5,)}, "attention_levels must be whole numbers of at least 0, at most 4"),
        ({"blocks": 0}, "blocks"),
        ({"latent": 0}, "latent"),
        ({"patch": 2}, "patch must be 1 for network 'vqgan'"),
        ({"network": "vqvae", "patch": 2}, "patch must be 1 for network 'vqvae'"),
        ({"network": "vqvae", "width": 6, "multipliers": (1, 1)}, "must be a multiple of 4"),
        ({"network": "patches", "patch": 5, "image_size": 80}, "must be even"),
        ({"network": "patches", "patch": 4, "width": 9}, "must be even"),
        ({"precision": "bf16-paper"}, "use bf16"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**wrong)


@pytest.mark.parametrize(("name", "ends"), [("symmetric", (-1, 1)), ("unit", (0, 1)), ("centered", (-0.5, 0.5))])
def test_pixel_ranges_have_their_ends_and_an_inverse(name, ends):
    image = np.arange(256, dtype=np.uint8)
    x = pixels.to_range(pixels.to_unit(image), name)
    assert x.dtype == np.float32 and (x[0], x[-1]) == ends
    np.testing.assert_allclose(np.diff(x), (ends[1] - ends[0]) / 255, rtol=1e-4)
    np.testing.assert_array_equal(pixels.to_uint8(pixels.from_range(x, name)), image)
    assert pixels.from_range(x * 3, name).max() > 1  # not clipped: a loss sees how far
