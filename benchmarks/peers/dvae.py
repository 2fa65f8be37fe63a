"""Our side of `compare.py --peer dvae`: training and encoding by a dVAE, which OpenAI's modules in torch have too.

The paper's network at a quarter of its width and with half of its blocks, over pictures of a quarter of its side, with
1024 codes. A training step is loss, gradients and AdamW; ours is the training's own, which also keeps the moving
average and measures hard reconstruction of every eighth picture; theirs is that loss in torch. JAX is imported inside
functions alone: the peer's script takes the constants from here.
"""

from benchmarks import harness

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
    return harness.training_step(settings_of(precision), {"image": pictures()})


def encoder(precision: str):
    """A function that makes codes of a batch of pictures."""
    import functools

    import jax

    from dalle_jax.models import build
    from dalle_jax.models.dvae import encode_images

    model, image = build("dvae", settings_of(precision).model), pictures()
    params, encode = jax.jit(model.init)(jax.random.key(0)), jax.jit(functools.partial(encode_images, model))
    return lambda: encode(params, image)


def notes(_) -> list[str]:
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    return [
        f"Shape: {shape}, batch {BATCH}; the objective of the paper (logit-Laplace, Gumbel-softmax at temperature 1, "
        f"beta {BETA}), AdamW."
    ]
