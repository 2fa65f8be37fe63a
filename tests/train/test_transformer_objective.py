"""The transformer and its loss against an independent reading of the paper in float64, and what a config trains."""

import jax
import numpy as np
import pytest

from dalle_jax.model_dir import ModelDir
from dalle_jax.models import build
from dalle_jax.train.objectives import build_task
from tests.support import numpy_transformer
from tests.support.demo_settings import demo_settings
from tests.support.parameters import random_parameters


@pytest.mark.parametrize(("layers", "text_len", "grid"), [(3, 5, 6), (2, 3, 13), (1, 2, 1), (4, 2, 4)])
def test_logits_and_loss_equal_an_independent_reading(layers, text_len, grid):
    """Sections 2.2 and 2.3: embeddings, shift by one, padding, blocks, masks, heads, 1/8 text and 7/8 image."""
    sizes = {"num_layers": layers, "width": 14, "heads": 3, "head_size": 5, "text_len": text_len, "text_vocab": 9}
    sizes |= {"grid": grid, "image_vocab": 7}
    tokenizer = build("dvae", {"image_size": 8 * grid, "vocab": 7})
    values = {f"model.{key}": value for key, value in sizes.items()} | {"data.image_size": 8 * grid}
    task = build_task(demo_settings("transformer", values), {"image_tokenizer": ModelDir({}, tokenizer, {})})
    params, rng = random_parameters(task.model), np.random.default_rng(1)
    captions = [rng.integers(9, size=length) for length in (text_len + 1, text_len // 2)]  # one is cut, one is padded
    images = rng.integers(7, size=(2, grid * grid)).astype(np.int32)
    text = np.stack([task.model.config.layout.caption_ids(caption) for caption in captions])

    @jax.jit
    def computed(params):
        loss, _ = task.loss(params, {}, {"text": text, "image_tokens": images}, key=None, step=None)
        return *task.model.apply(params, text, images), loss

    *logits, loss = computed(params)
    read = [numpy_transformer.read(params, list(c), list(i)) for c, i in zip(captions, images, strict=True)]
    for found, wanted in zip(logits, zip(*(one[:2] for one in read), strict=True), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)  # float32 through all layers
    assert float(loss) == pytest.approx(np.mean([one[2] for one in read]), rel=1e-6)
