"""The sampling engine: text tokens in, image tokens out, row by row, from a key-value cache on the devices.

Knows tokens only: no captions, no images, no files. A batch is what is drawn together: P captions with M candidates
each, so B = P x M images, those of a caption side by side. `begin` reads the text once per caption, `advance` draws
some rows in one compiled loop. An image depends on its key, caption and settings and not on its neighbors: position p
is drawn with the noise of fold_in(key, p). With guidance every image has a twin that reads the empty caption; the two
share their image tokens.

Images are cut over the mesh's devices, heads and hidden units along `tensor`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import Model, Params, decoding
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.sample import batches
from dalle_jax.sample.logits import draw, filter_logits, guide, noise

MIN_TEMPERATURE = 0.001  # below, only the likeliest token could be drawn


@dataclasses.dataclass(frozen=True)
class Program:
    """The static arguments of the compiled programs.

    guided: every image has a twin. filtered: some image has a top_k or top_p.
    """

    config: TransformerConfig
    mesh: Mesh
    guided: bool
    filtered: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images while they are drawn. arrays: on the devices, donated to `advance`. shape: (P, M)."""

    program: Program
    arrays: dict[str, Any]
    shape: tuple[int, int]


def widest_mesh(heads: int, devices: Sequence[Any]) -> Mesh:
    """These devices, of which as many share the weights as a model's heads divide among."""
    return make_mesh({sharding.REPLICA: -1, sharding.TENSOR: math.gcd(len(devices), heads)}, devices=devices)


def weight_bytes(model: Model, mesh: Mesh) -> int:
    """Bytes of a transformer's weights on each device of a mesh."""
    params = dict(model.abstract)
    block = {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in params.pop("blocks").items()}

    def held(weights, axes) -> int:
        pairs = zip(jax.tree.leaves(weights), jax.tree.leaves(_places(weights, axes, mesh)), strict=True)
        return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in pairs)

    layer = jax.eval_shape(functools.partial(decoding.layer_weights, model.config), block)
    ends = jax.eval_shape(functools.partial(decoding.end_weights, model.config), params)
    return model.config.num_layers * held(layer, decoding.LAYER_AXES) + held(ends, decoding.END_AXES)


def image_keys(seeds):
    """jax.random keys from the seed of each image, integers in [0, 2**32), of any shape.

    Of one generator, whatever `jax_default_prng_impl` says: a seed is a picture.
    """
    seeds = np.asarray(seeds, np.uint32)
    return jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds.reshape(-1)).reshape(seeds.shape)


class Engine:
    """A transformer's weights, laid out for sampling on a mesh of this process's devices."""

    def __init__(self, model: Model, params: Params, *, mesh: Mesh, weights: str = "model"):
        """params: float32, on the host or a device; converted layer by layer, so the devices never hold them whole.
        weights: 'model' (the model's compute dtype) or 'int8', see `decoding.layer_weights`.

        Raises:
          UserError: an unknown kind of weights.
        """
        if weights not in decoding.WEIGHTS:
            raise UserError(f"weights must be one of {decoding.WEIGHTS}, got {weights!r}")
        self.config, self.mesh = model.config, mesh
        blocks = params["blocks"]
        layers = []
        for i in range(self.config.num_layers):
            layer = _layer_weights(self.config, {name: a[i] for name, a in blocks.items()}, weights=weights)
            layers.append(jax.device_put(layer, _places(layer, decoding.LAYER_AXES, self.mesh)))
        ends = _end_weights(self.config, {name: array for name, array in params.items() if name != "blocks"})
        self._weights = layers, jax.device_put(ends, _places(ends, decoding.END_AXES, self.mesh))

    @property
    def batch_multiple(self) -> int:
        """The number of images in a batch must be a multiple of this."""
        return sharding.batch_ways(self.mesh)

    def begin(
        self,
        text_PT,
        keys_PM,
        *,
        temperature: Sequence[float] | float = 1.0,
        top_k: Sequence[int | None] | int | None = None,
        top_p: Sequence[float | None] | float | None = None,
        guidance: Sequence[float] | float = 1.0,
        given_PI=None,
        given_rows: Sequence[int] | int = 0,
    ) -> Batch:
        """A batch of which nothing is drawn yet, with the text read.

        text_PT: int32 text tokens. keys_PM: jax.random keys, one per image. temperature, top_k, top_p, guidance: one,
        or one per caption; a temperature below MIN_TEMPERATURE draws the likeliest token. given_PI: int32 image tokens
        whose first `given_rows` rows (one number, or one per caption) are kept as they are: the top of an image to
        complete.

        Raises:
          ValueError: the number of images is no multiple of `batch_multiple`.
        """
        prompts, candidates = keys_PM.shape
        if (prompts * candidates) % self.batch_multiple:
            raise ValueError(f"expected a multiple of {self.batch_multiple} images, got {prompts} x {candidates}")
        layout = self.config.layout

        def each(value, default, dtype):
            values = [value] * prompts if value is None or np.ndim(value) == 0 else value
            return np.repeat(np.asarray([default if v is None else v for v in values], dtype), candidates)

        guidance_B, temperature_B = each(guidance, 1.0, np.float32), each(temperature, 1.0, np.float32)
        likeliest_B = temperature_B < MIN_TEMPERATURE
        settings = {
            "temperature": np.where(likeliest_B, 1, temperature_B),
            "top_k": np.where(likeliest_B, 1, each(top_k, layout.image_vocab, np.int32)),
            "top_p": each(top_p, 1.0, np.float32),
            "guidance": guidance_B,
            "given": each(given_rows, 0, np.int32) * self.config.grid,
        }
        filtered = bool((settings["top_k"] < layout.image_vocab).any() or (settings["top_p"] < 1).any())
        guided = bool((guidance_B != 1).any())
        if guided:
            text_PT = np.concatenate([text_PT, np.tile(layout.caption_ids([]), (prompts, 1))])
        given_PI = np.zeros((prompts, layout.image_len), np.int32) if given_PI is None else np.asarray(given_PI)
        keys_B, tokens_IB = keys_PM.reshape(-1), np.repeat(given_PI, candidates, axis=0).T
        program = Program(self.config, self.mesh, guided=guided, filtered=False)  # `_begin` is the same for both
        arrays = _begin(program, self._weights, jnp.asarray(text_PT), keys_B, jnp.asarray(tokens_IB), settings)
        return Batch(dataclasses.replace(program, filtered=filtered), arrays, (prompts, candidates))

    def advance(self, batch: Batch, first_row: int, last_row: int) -> Batch:
        """The batch with rows first_row .. last_row - 1 drawn; rows come in order, each once."""
        with jax.threefry_partitionable(True):  # the same bits on any number of devices, and whatever JAX's flag says
            arrays = _advance(batch.program, self._weights, batch.arrays, np.int32(first_row), np.int32(last_row))
        return dataclasses.replace(batch, arrays=arrays)

    def tokens(self, batch: Batch) -> np.ndarray:
        """int32 [P, M, I]: the image tokens; in rows that are not drawn yet as they were given, or zero."""
        return np.asarray(batch.arrays["tokens"]).T.reshape(*batch.shape, -1)

    def batch_bytes(self, prompts: int, candidates: int, *, guided: bool) -> int:
        """Bytes that a batch of this shape holds or makes at a time on all devices together: text and image stores,
        noise of a row, logits. Weights are not counted."""
        config, streams = self.config, 2 if guided else 1
        images = prompts * candidates
        layers, ends = self._weights
        text_PT = jax.ShapeDtypeStruct((prompts * streams, config.text_len), jnp.int32)
        text = jax.eval_shape(functools.partial(decoding.prefill, config), layers, ends, text_PT)
        stores = jax.eval_shape(lambda: decoding.empty_cache(config, images * streams))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((text, stores)))
        repeated = self.mesh.size // self.batch_multiple  # of what is not cut along heads
        return held + repeated * 4 * images * config.image_vocab * (config.grid + 4 * streams)

    def capacity(self, *, guided: bool) -> batches.Capacity:
        """The maximum number of images in a batch with what memory is free now, and why."""
        first = self.batch_bytes(1, 1, guided=guided)
        image = self.batch_bytes(1, 2, guided=guided) - first
        return batches.capacity(
            image_bytes=image, prompt_bytes=first - image, mesh=self.mesh, multiple=self.batch_multiple
        )


_layer_weights = jax.jit(decoding.layer_weights, static_argnums=0, static_argnames="weights")
_end_weights = jax.jit(decoding.end_weights, static_argnums=0)


def _places(weights, axes, mesh: Mesh):
    """Shardings of weights; a scale of int8 weights lies like the outputs of its matrix, the leading dimensions."""

    def place(path, leaf):
        names = axes[path[0].key][: leaf.ndim]
        return jax.sharding.NamedSharding(mesh, sharding.spec(leaf.shape, names, mesh))

    return jax.tree_util.tree_map_with_path(place, weights)


@functools.partial(jax.jit, static_argnums=0)
def _begin(program: Program, weights, text_PT, keys_B, tokens_IB, settings):
    config, (layers, ends) = program.config, weights
    with sharding.use(program.mesh):
        images = keys_B.size * (2 if program.guided else 1)
        return {
            "stores": decoding.prefill(config, layers, ends, text_PT),
            "cache": decoding.empty_cache(config, images),
            "tokens": tokens_IB,
            "previous": jnp.full(keys_B.shape, config.layout.start_of_image, jnp.int32),
            "keys": keys_B,
            "settings": settings,
        }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(program: Program, weights, arrays, first_row, last_row):
    config, guided, (layers, ends) = program.config, program.guided, weights
    settings, keys_B, vocab = arrays["settings"], arrays["keys"], config.image_vocab

    def choose(logits_VB, noise_BV):
        logits_BV = logits_VB.T
        if guided:
            conditional, unconditional = jnp.split(logits_BV, 2)
            logits_BV = guide(conditional, unconditional, settings["guidance"][:, None])
        limits = {"top_k": settings["top_k"], "top_p": settings["top_p"]} if program.filtered else {}
        return draw(filter_logits(logits_BV, temperature=settings["temperature"], **limits), noise_BV)

    def one_row(row, arrays):
        position_G = row * config.grid + jnp.arange(config.grid)
        # A row's noise at once: a few positions' worth is too little work for a program of its own.
        noise_GBV = jax.vmap(lambda p: jax.vmap(lambda key: noise(key, p, vocab))(keys_B))(position_G)
        noise_GBV = sharding.constrain(noise_GBV, (None, "batch", None))
        given_GB = jax.lax.dynamic_slice_in_dim(arrays["tokens"], row * config.grid, config.grid)

        def one_position(carry, inputs):
            previous_B, cache = carry
            position, noise_BV, given_B = inputs
            twice = jnp.tile(previous_B, 2 if guided else 1)
            logits, cache = decoding.decode(config, layers, ends, arrays["stores"], cache, twice, position)
            drawn_B = jnp.where(position < settings["given"], given_B, choose(logits, noise_BV))
            return (drawn_B, cache), drawn_B

        carry = arrays["previous"], arrays["cache"]
        (previous_B, cache), row_GB = jax.lax.scan(one_position, carry, (position_G, noise_GBV, given_GB))
        tokens_IB = jax.lax.dynamic_update_slice_in_dim(arrays["tokens"], row_GB, row * config.grid, axis=0)
        return arrays | {"tokens": tokens_IB, "previous": previous_B, "cache": cache}

    with sharding.use(program.mesh):
        return jax.lax.fori_loop(first_row, last_row, one_row, arrays)
