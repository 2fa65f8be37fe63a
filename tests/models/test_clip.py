"""CLIP: what its text tower sees, its loss by the paper's pseudo-code, equality of its ways of computing, training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build, clip
from dalle_jax.models.attention.blockwise import attend_text
from dalle_jax.models.blocks import scan_layers
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.sample.rerank import Reranker
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.train import run
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives import clip as clip_task
from dalle_jax.train.optimizer import matrices, powersgd
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.settings import load_settings
from dalle_jax.train.step import TrainStep
from tests.support.tiny_clip import (
    ONE_LAYER,
    TINY,
    apply,
    encode_captions,
    encode_images,
    random_batch,
    random_params,
    tiny_settings,
)


@pytest.mark.parametrize(("variant", "parameters"), [("b32", 151_277_313), ("b16", 149_620_737), ("l14", 427_616_513)])
def test_parameter_counts_are_those_of_the_released_models(variant, parameters):
    assert build("clip", load_settings(f"configs/clip.py:{variant}").model).num_params == parameters


def test_initial_values_are_those_of_the_released_code():
    """`CLIP.initialize_parameters` of github.com/openai/CLIP, which leaves the blocks of the image tower at PyTorch's
    defaults: xavier_uniform for the projection in, else uniform in 1 / sqrt(fan-in)."""
    layers, width, up, patch = 4, 64, 4 * 64, 3 * 8**2
    sizes = {"image_layers": layers, "image_width": width, "text_layers": layers, "text_width": width}
    config = dataclasses.replace(TINY, text_vocab=200, image_size=64, patch=8, embed=32, **sizes)
    params = jax.device_get(jax.jit(clip.model(config).init)(jax.random.key(0)))

    def flat(tree):
        return {powersgd.name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    residual = width**-0.5 * (2 * layers) ** -0.5
    normal = {"embedding": 0.02, "position": 0.01, "projection": width**-0.5, "blocks-qkv": width**-0.5}
    normal |= {"blocks-out": residual, "blocks-up": (2 * width) ** -0.5, "blocks-down": residual}
    uniform = {"patch": patch**-0.5, "blocks-qkv": (6 / (width + 3 * width)) ** 0.5, "blocks-out": width**-0.5}
    uniform |= {"blocks-up": width**-0.5, "blocks-up_bias": width**-0.5}
    uniform |= {"blocks-down": up**-0.5, "blocks-down_bias": up**-0.5}
    scaled = dict.fromkeys(("class_embedding", "position", "projection"), width**-0.5)
    for tower, normals, uniforms in (("image", scaled, uniform), ("text", normal, {})):
        for name, x in flat(params[tower]).items():
            if name in uniforms:
                np.testing.assert_allclose(np.abs(x).max(), uniforms[name], rtol=0.03, err_msg=name)
                assert np.abs(x).max() <= uniforms[name] and x.std() * 3**0.5 == pytest.approx(uniforms[name], rel=0.1)
            elif name in normals:
                assert x.std() == pytest.approx(normals[name], rel=5 / (2 * x.size) ** 0.5), name  # 5 standard errors
                assert np.abs(x).max() > 2 * normals[name], name  # not uniform
            else:
                assert set(x.ravel()) == {1.0 if name.endswith("gain") else 0.0}, name


def test_captions_lie_between_both_marks():
    layout = TINY.layout
    assert list(layout.caption_ids([3, 4])) == [11, 3, 4, 12, 0, 0]
    assert list(layout.caption_ids(range(9))) == [11, 0, 1, 2, 3, 12]  # cut, the end mark stays
    with pytest.raises(ValueError, match="does not belong to this model"):
        layout.caption_ids([11])


def test_no_text_state_depends_on_a_later_token():
    """Before pooling: changing a token changes no state before it; what follows the end mark changes no feature."""
    params, (_, text) = random_params(TINY), random_batch(TINY, batch=1)
    stacked = params["text"]["blocks"]

    @jax.jit
    def states(ids):
        x = params["text"]["embedding"][ids] + params["text"]["position"][None]
        return scan_layers(stacked, x, attends=[attend_text] * TINY.text_layers, remat="none")[0]

    before = np.asarray(states(text))
    for place in range(TINY.text_len):
        other = text.copy()
        other[0, place] = (text[0, place] + 1) % 11
        moved = np.abs(states(other) - before).max(-1) > 0
        np.testing.assert_array_equal(moved, np.arange(TINY.text_len) >= place)


def test_only_what_comes_before_the_end_mark_counts():
    model, params, layout = clip.model(TINY), random_params(TINY), TINY.layout
    text = np.stack([layout.caption_ids([1, 2])] * 3)
    text[1, 4:] = layout.end_of_text  # padded as Hugging Face does
    text[2, 2] = 5
    features = np.asarray(apply(model, params, text, method="encode_text"))
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)
    assert np.abs(features[0] - features[2]).max() > 1e-3


def test_vectors_are_of_unit_length_and_pixels_are_normalized():
    model, params, (image, text) = clip.model(TINY), random_params(TINY), random_batch(TINY)
    for vectors in (encode_images(model, params, image), encode_captions(model, params, text)):
        assert vectors.shape == (4, 8) and vectors.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1.0, atol=1e-6)
    mean = np.array(TINY.mean) * 255
    np.testing.assert_allclose(clip.normalize(np.broadcast_to(mean, (1, 2, 2, 3)), TINY), 0.0, atol=1e-6)


def by_pseudo_code(image_BE, text_BE, scale):
    """Figure 3 of Radford et al. 2021 in float64 numpy: logits, and cross-entropy over rows and over columns."""
    logits = image_BE.astype(np.float64) @ text_BE.astype(np.float64).T * scale
    total = 0.0
    for rows in (logits, logits.T):
        log_share = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        total -= np.mean([log_share[i, i] for i in range(len(rows))])
    return total / 2


def test_loss_and_gradient_are_those_of_the_pseudo_code():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 5, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    loss = lambda image, text, scale: clip_task.contrastive_loss(image, text, scale)[0]  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(*vectors, jnp.float32(7.0))
    assert value == pytest.approx(by_pseudo_code(*vectors, 7.0), rel=1e-5)
    for part in (0, 1):  # by central differences of the reference
        for place in ((0, 0), (3, 5)):
            moved = [vectors.astype(np.float64), vectors.astype(np.float64)]
            for sign, array in zip((1, -1), moved, strict=True):
                array[part][place] += sign * 1e-5
            slope = (by_pseudo_code(*moved[0], 7.0) - by_pseudo_code(*moved[1], 7.0)) / 2e-5
            assert grads[part][place] == pytest.approx(slope, abs=1e-5)
    slope = (by_pseudo_code(*vectors, 7.001) - by_pseudo_code(*vectors, 6.999)) / 2e-3
    assert grads[2] == pytest.approx(slope, abs=1e-5)


def test_accuracies_count_nearest_partners():
    image, text = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 1, 1]]
    _, image_right, text_right = clip_task.contrastive_loss(image, text, 5.0)
    assert float(image_right) == 1.0  # the third picture is as far from every caption: nothing is nearer than its own
    assert float(text_right) == pytest.approx(2 / 3)  # the third caption is nearer to the second picture


def test_the_scale_is_clipped_at_100_and_can_come_back():
    model, batch = clip.model(TINY), random_batch(TINY)
    params = random_params(TINY) | {"log_scale": jnp.array([9.0])}
    assert float(apply(model, params, clip.normalize(batch[0], TINY), batch[1])[2]) == pytest.approx(100.0)
    slope = jax.grad(lambda x, sign: sign * clip.at_most(x, 2.0))
    assert [float(slope(x, sign)) for x in (1.0, 3.0) for sign in (1.0, -1.0)] == [1.0, -1.0, 1.0, 0.0]


def test_bf16_is_close_to_fp32():
    params, (image, _) = random_params(TINY), random_batch(TINY)
    exact = encode_images(clip.model(TINY), params, image)
    rounded = encode_images(clip.model(dataclasses.replace(TINY, precision="bf16")), params, image)
    assert rounded.dtype == jnp.float32
    assert 0 < np.linalg.norm(exact - rounded) < 0.05 * np.linalg.norm(exact)  # 8 bits of mantissa through 2 layers


def test_eight_devices_train_as_one_does():
    """The loss of the whole batch, whatever its cut: every picture is told from every caption, also of other devices.

    The loss of eight batches of one is zero, so the test would see a loss that stayed on its device.
    """
    settings = tiny_settings({"optimizer.name": "adamw", **ONE_LAYER})
    task = build_task(settings, {})
    image, text = random_batch(TINY, batch=8)
    built = build_optimizer(settings.optimizer, steps=10, axes=task.model.axes)
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)), devices=devices)
        training = TrainStep(task, built, mesh)
        state = training.init(jax.random.key(0))
        batch = sharding.shard_batch({"image": image, "text": text}, mesh)
        _, metrics = training.update(state, {}, batch, jax.random.key(1))
        found.append(jax.device_get(metrics))
    assert found[0]["loss"] > 1.0 and found[0]["grad_norm"] > 0.1
    for metrics in found[1:]:
        assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in found[0].items()}


def test_embeddings_decay_but_gains_and_biases_do_not():
    """Section 2.5: decay on all weights that are not gains or biases."""
    decays = matrices.decay_mask(clip.model(TINY).axes, tables=True)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): d for path, d in jax.tree.leaves_with_path(decays)}
    kept = {name for name, d in names.items() if not d}
    assert kept == {name for name in names if name.endswith(("gain", "bias", "log_scale"))}
    assert not matrices.decay_mask(clip.model(TINY).axes)["text"]["embedding"]


def test_microbatches_are_refused():
    with pytest.raises(UserError, match=r"config.accumulate = 1 for CLIP, got 2.*remat"):
        build_task(tiny_settings({"accumulate": 2}), {})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.image_size", 16, "config.data.image_size = config.model.image_size = 8, got 16"),
        ("model.patch", 3, "image_size must be a multiple of patch"),
        ("model.text_heads", 3, "text_width must be a multiple of text_heads"),
        ("model.remat", "some", "remat must be one of"),
        ("model.text_len", 2, "text_len must be at least 3"),
        ("model.embed", 0, "embed must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        tiny_settings({key: value})


def test_pixel_statistics_must_be_three():
    with pytest.raises(ValueError, match="three numbers"):
        CLIPConfig(mean=[0.5])
    with pytest.raises(ValueError, match="std above 0"):
        CLIPConfig(std=[0.5, 0.0, 0.5])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Three updates on scenes, by the loop of every task."""
    folder = tmp_path_factory.mktemp("clip")
    BPETokenizer.train([f"a {c} {s}" for c in ("red", "blue") for s in ("circle", "star")], vocab_size=300).save(folder)
    values = {
        "tokenizer": folder,
        "model.text_vocab": 300,
        "run.data.threads": 0,
        "optimizer.name": "adamw",
        **ONE_LAYER,
    }
    values |= {"run.data.train": "scenes:train@24", "run.data.validation": "scenes:val@24"}
    values |= {"optimizer.schedule.warmup_steps": 0}
    settings = tiny_settings(values, steps=3, log_every=1, validation_batches=1, validate_every=3)
    run.train(settings, folder / "run", progress=False)
    (folder / "tokenizer.model").unlink()
    return folder / "run"


def test_a_workdir_is_trained_and_self_contained(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"train/loss", "train/scale", "train/image_to_text_accuracy", "validation/text_to_image_accuracy"} <= names
    reranker = Reranker.load(workdir)
    assert reranker.model.config.text_vocab == reranker.tokenizer.vocab_size
    assert reranker.score(np.zeros((2, 24, 24, 3), np.uint8), "a red star").shape == (2,)
