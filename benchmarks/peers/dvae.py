"""Our side of `compare.py --peer dvae`: training and encoding by a dVAE, which OpenAI's modules in torch have too.

The paper's network at a quarter of its width and with half of its blocks, over pictures of a quarter of its side, with
1024 codes. A training step is loss, gradients and AdamW; ours is the training's own, which also keeps the moving
average and measures hard reconstruction of every eighth picture; theirs is that loss in torch. JAX is imported inside
functions alone: the peer's script takes the constants from here.
"""

# Of both sides; groups and kernels are the paper's.
SHAPE = dict(image_size=64, vocab=1024, width=64, stem=128, blocks_per_group=1)
BATCH, LEARNING_RATE, BETA = 8, 1e-4, 6.6


def build_work(work: str):
    """The function that does one of our works once."""
    verb, _, way = work.partition("_")
    return {"train": trainer, "encode": encoder}[verb](way)


def settings_of(precision: str):
    from dalle_jax.train.settings import load_settings

    values = {f"model.{key}": value for key, value in SHAPE.items()} | {
        "data.image_size": SHAPE["image_size"],
        "model.precision": precision,
        "batch_size": BATCH,
        "optimizer.learning_rate": LEARNING_RATE,
        "objective.beta.start": BETA,
        "objective.temperature.steps": 0,
        "objective.temperature.end": 1.0,
    }
    return load_settings("configs/dvae.py:paper").changed(values)


def pictures():
    import numpy as np

    shape = (BATCH, SHAPE["image_size"], SHAPE["image_size"], 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def trainer(precision: str):
    """A function that does one training step, as the training loop calls it."""
    import jax

    from dalle_jax import sharding
    from dalle_jax.mesh import make_mesh
    from dalle_jax.train import run
    from dalle_jax.train.objectives import build_task

    settings, mesh, key = settings_of(precision), make_mesh({}), jax.random.key(0)
    training = run.step_for(settings, build_task(settings, {}), mesh)
    batch = sharding.shard_batch({"image": pictures()}, mesh)
    state = [training.init(key)]

    def step():
        state[0], metrics = training.update(state[0], {}, batch, key)
        jax.block_until_ready((state[0], metrics))

    return step


def encoder(precision: str):
    """A function that makes codes of a batch of pictures."""
    import functools

    import jax

    from dalle_jax.models import build
    from dalle_jax.models.dvae import encode_images

    model, image = build("dvae", settings_of(precision).model), pictures()
    params, encode = jax.jit(model.init)(jax.random.key(0)), jax.jit(functools.partial(encode_images, model))
    return lambda: jax.block_until_ready(encode(params, image))


def notes(_) -> list[str]:
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    return [
        f"Shape: {shape}, batch {BATCH}; the objective of the paper (logit-Laplace, Gumbel-softmax at temperature 1, "
        f"beta {BETA}), AdamW."
    ]
