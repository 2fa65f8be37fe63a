"""An image tokenizer that trains against a discriminator, tiny: gradients, runs, and what is refused beforehand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dalle_jax import model_dir, sharding
from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build, discriminator
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.model import last_weight
from dalle_jax.train import loop, run
from dalle_jax.train.adversary import METRICS, beside, made_by
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives.task import OBSERVED
from tests.support.demo_settings import demo_settings
from tests.support.line_task import Numbers, digest_of, logged
from tests.support.parameters import random_parameters
from tests.support.toy_task import one_device
from tests.support.trees import identical

pytestmark = pytest.mark.usefixtures("compile_once")
SIDE = 16
ADVERSARY = {"learns_from": 1, "start": 3, "width": 4, "layers": 1, "weight": 0.5}
TINY = {
    "model.image_size": SIDE, "data.image_size": SIDE, "model.vocab": 8, "model.code_dim": 4, "model.width": 8,
    "model.multipliers": (1,), "model.blocks": 1, "objective.codebook.start": None, "objective.codebook.noise": 0.0,
    "objective.codebook.kmeans": False, "objective.codebook.dead_below": None, "objective.codebook.rule": "loss",
    "objective.adversary": ADVERSARY, "batch_size": 4, "run.steps": 6, "optimizer.schedule.name": "warmup_constant",
    "run.log_every": 1, "run.validate_every": 3, "run.picture_every": None, "run.checkpoint_every": 2,
    "optimizer.schedule.warmup_steps": 0,
}  # fmt: skip
NETWORKS = {
    "patches": dict(network="patches", width=4, multipliers=(1,), blocks=1, patch=4, attention_levels=()),
    "vqvae": dict(network="vqvae", width=4, multipliers=(1, 2), blocks=1, attention_levels=()),
    "vqgan": dict(network="vqgan", width=32, multipliers=(1, 1), blocks=1, attention_levels=(), latent=4),
}


def settings(**values):
    return demo_settings("vq", TINY | values)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def measured_by(task, *, devices: int = 1):
    """The compiled (params, pictures, step) -> gradients and metrics, of a batch over so many devices."""
    mesh = make_mesh({"replica": devices, "fsdp": 1}, devices=jax.devices()[:devices])

    def of(params, image, step):
        with sharding.use(mesh):
            return jax.grad(
                lambda p: task.loss(p, {}, {"image": image}, key=jax.random.key(0), step=step, memory={}), has_aux=True
            )(params)

    compiled = jax.jit(of)

    def call(params, image, step):
        params = jax.device_put(params, sharding.replicated(mesh))
        grads, metrics = compiled(params, jax.device_put(image, sharding.batch_sharding(mesh)), step)
        metrics.pop(OBSERVED)
        return jax.device_get((grads, metrics))

    return call


@pytest.fixture(scope="module")
def tiny():
    """Parameters of both sides, and `measured_by` of their task."""
    task = build_task(settings(), {})
    assert (task.onset.metric, task.onset.start) == ("reconstruction", ADVERSARY["start"])
    params = random_parameters(task.model, deviation=0.1)
    return params, measured_by(task)


class Pictures(Numbers):
    """Batches of pictures that depend on their number alone."""

    def batch(self, number):
        return {"image": pictures(4, seed=number)}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_by_the_last_weight_is_the_decoders(network):
    config = VQConfig(image_size=SIDE, vocab=8, code_dim=4, **NETWORKS[network])
    model = build("vq", config)
    params, rng = random_parameters(model), np.random.default_rng(1)
    q_BRCD = rng.standard_normal((2, config.grid, config.grid, 4), np.float32)
    by_images = rng.standard_normal((2, SIDE, SIDE, 3), np.float32)

    @jax.jit
    def both(params, q_BRCD, by_images):
        images, by_last = made_by(model, params, q_BRCD, method="decode", last=last_weight(config))

        def total(params):
            return (model.apply(params, q_BRCD, method="decode") * by_images).sum()

        return images, by_last(by_images), total(params), jax.grad(total)(params)

    images, by_last, total, gradient = both(params, q_BRCD, by_images)
    np.testing.assert_allclose((images * by_images).sum(), total, rtol=1e-4)
    for key in last_weight(config):
        gradient = gradient[key]
    np.testing.assert_allclose(by_last, gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())


def test_until_the_start_the_tokenizer_learns_as_without_an_adversary(tiny):
    """The discriminator learns before; at the start the tokenizer's gradients change."""
    params, measure = tiny
    own = {name: part for name, part in params.items() if name != "discriminator"}
    alone, _ = measured_by(build_task(settings(**{"objective.adversary": None}), {}))(own, pictures(4), 0)
    for step in (0, 1, 2, 3, 9):
        grads, metrics = measure(params, pictures(4), step)
        judged = grads.pop("discriminator")
        assert "reconstruction" in metrics
        assert any(map(np.any, jax.tree.leaves(judged))) == (step >= ADVERSARY["learns_from"])
        pairs = zip(jax.tree.leaves(grads["decoder"]), jax.tree.leaves(alone["decoder"]), strict=True)
        same = all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)
        assert same == (step < ADVERSARY["start"]) == (metrics["adversary_weight"] == 0)


def test_both_start_from_the_values_that_they_have_alone():
    config = VQConfig(image_size=SIDE, vocab=4, code_dim=2, **NETWORKS["patches"])
    model, judge = build("vq", config), discriminator.DiscriminatorConfig(width=2, layers=1)
    together = beside(model, judge)
    assert together.config == config and together.abstract["discriminator"] == discriminator.model(judge).abstract

    @jax.jit
    def init(key):
        return model.init(key), together.init(key)

    alone, both = init(jax.random.key(0))
    assert both.pop("discriminator")["conv_0"]["weight"].std() > 0
    identical(alone, both)


def test_two_pictures_on_two_devices_are_one_batch(tiny):
    params, measure = tiny
    image = np.concatenate([pictures(2)] * 2)  # twice the same: the same means as of two
    want, want_metrics = measure(params, image, 9)
    grads, metrics = measured_by(build_task(settings(batch_size=2), {}), devices=2)(params, image[:2], 9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5), grads, want)
    for name in METRICS:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-3, err_msg=name)
    assert metrics["adversary_weight"] > 0


@pytest.mark.parametrize("level", [0, 255])
def test_pictures_of_a_single_color_do_no_harm(tiny, level):
    params, measure = tiny
    grads, metrics = measure(params, np.full((4, SIDE, SIDE, 3), level, np.uint8), 9)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, metrics)))
    assert 0 < metrics["adversary_weight"] <= 0.5 * 1e4


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_leaves_a_tokenizer(tmp_path):
    """The last held-out batch has one picture, whose statistics are its own."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for workdir, ends in ((straight, [6]), (stopped, [4, 6])):  # stopped when the adversary has counted in one update
        for steps in ends:
            found = settings(**{"run.steps": steps})
            step = run.step_for(found, build_task(found, {}), one_device())
            held_out = [{"image": pictures(count, seed=9)} for count in (4, 1)]
            loop.run(step, found, workdir, batches=Pictures(), validation=lambda held=held_out: held, progress=False)
    assert digest_of(straight) == digest_of(stopped)
    weight = logged(straight, "train/adversary_weight")
    assert [bool(weight[step]) for step in range(1, 7)] == [False] * 3 + [True] * 3
    assert set(logged(straight, "validation/discriminator_loss")) == {3, 6}
    (straight / "config.json").write_text(json.dumps(dataclasses.asdict(settings())))
    tokenizer = model_dir.load(straight)
    assert "discriminator" not in tokenizer.params
    assert main.main(["export", str(straight), str(tmp_path / "out")]) == 0
    assert model_dir.load(tmp_path / "out").digest == tokenizer.digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "adversary.norm=group"),
        ({"batch_size": 4, "accumulate": 4}, "adversary.norm=group"),
        ({"run.steps": 3}, "adversary.start below config.run.steps = 3, got 3"),
        ({"objective.adversary": {**ADVERSARY, "layers": 4}}, "adversary.layers = 4"),
        ({"compression.rank": 4}, "compression.rank = None"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_update(values, message):
    with pytest.raises(UserError, match=message):
        found = settings(**values)
        run.mesh_for(found, build_task(found, {}), devices=jax.devices()[:1])


def test_a_batch_of_one_is_taken_with_the_other_norm():
    adversary = {**ADVERSARY, "width": 16, "norm": "group"}
    task = build_task(settings(batch_size=1, **{"objective.adversary": adversary}), {})
    found = jax.eval_shape(
        lambda params, image: task.loss(params, {}, {"image": image}, key=jax.random.key(0), step=9, memory={})[0],
        task.model.abstract,
        pictures(1),
    )
    assert found.shape == ()
