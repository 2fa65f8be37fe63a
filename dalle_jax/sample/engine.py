"""The sampling engine: text ids in, image ids out, row by row, from a key-value cache on the devices.

Speaks ids only: no captions, no pictures, no files. A wave is a set of images that are drawn together: C captions with
M candidates each. `begin` reads the text once per caption, `advance` draws some rows in one compiled loop. An image
depends on its own key, caption and settings and not on its neighbours: position p is drawn with the noise of
fold_in(key, p). With guidance every image has a twin that reads the empty caption; the two share their codes.

Images are cut over the mesh's devices, heads and hidden units along `tensor`.

Dimensions: C captions, M candidates of each, B = C x M images (a caption's side by side), T text slots, I image
positions, G grid side, V image vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import local_mesh
from dalle_jax.models import Model, Params, decoding
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.sample.logits import draw, filter_logits, guide, noise

Wave = dict[str, Any]  # on the devices; given up (donated) to `advance`


def image_keys(seeds):
    """jax.random keys from the seed of each image, integers in [0, 2**32), of any shape."""
    seeds = np.asarray(seeds, np.uint32)
    return jax.vmap(jax.random.key)(seeds.reshape(-1)).reshape(seeds.shape)


class Engine:
    """A transformer's weights, laid out for sampling on a mesh of this process's devices."""

    def __init__(
        self,
        model: Model,
        params: Params | None,
        *,
        mesh: Mesh | None = None,
        weights: str = "model",
    ):
        """params: float32, on the host or a device; converted layer by layer, so the devices never hold them whole.
        None: all weights are shapes only, of an engine that compiles and counts bytes for devices that are not here.

        weights: 'model' (the model's compute dtype) or 'int8', see `decoding.layer_weights`.

        Raises:
          UserError: an unknown kind of weights.
        """
        if weights not in decoding.WEIGHTS:
            raise UserError(f"weights must be one of {decoding.WEIGHTS}, got {weights!r}")
        self.config = model.config
        self.mesh = local_mesh() if mesh is None else mesh
        if params is None:
            self._weights = _abstract_weights(model, self.mesh, weights)
            return
        blocks = params["blocks"]
        layers = []
        for i in range(self.config.num_layers):
            layer = _layer_weights(self.config, {name: a[i] for name, a in blocks.items()}, weights)
            layers.append(jax.device_put(layer, _places(layer, decoding.LAYER_AXES, self.mesh)))
        ends = _end_weights(self.config, {name: params[name] for name in _END_PARAMS})
        self._weights = layers, jax.device_put(ends, _places(ends, decoding.END_AXES, self.mesh))

    @property
    def ways(self) -> int:
        """The number of images in a wave must be a multiple of this."""
        return sharding.batch_ways(self.mesh)

    def begin(
        self,
        text_CT,
        keys_CM,
        *,
        temperature: Sequence[float] | float = 1.0,
        top_k: Sequence[int | None] | int | None = None,
        top_p: Sequence[float | None] | float | None = None,
        guidance: Sequence[float] | float = 1.0,
        given_CI=None,
        given_rows: Sequence[int] | int = 0,
    ) -> Wave:
        """A wave of which nothing is drawn yet, with the text read.

        text_CT: int32 text slots. keys_CM: jax.random keys, one an image. temperature, top_k, top_p, guidance: one,
        or one a caption. given_CI: int32 codes whose first `given_rows` rows (one number, or one a caption) are kept
        as they are: the top of a picture to complete.

        Raises:
          ValueError: the number of images is no multiple of `ways`.
        """
        captions, candidates = keys_CM.shape
        if (captions * candidates) % self.ways:
            raise ValueError(f"expected a multiple of {self.ways} images, got {captions} x {candidates}")
        layout = self.config.layout

        def each(value, default, dtype):
            values = [value] * captions if value is None or np.ndim(value) == 0 else value
            return np.repeat(np.asarray([default if v is None else v for v in values], dtype), candidates)

        guidance_B = each(guidance, 1.0, np.float32)
        settings = {
            "temperature": each(temperature, 1.0, np.float32),
            "top_k": each(top_k, layout.image_vocab, np.int32),
            "top_p": each(top_p, 1.0, np.float32),
            "guidance": guidance_B,
            "given": each(given_rows, 0, np.int32) * self.config.grid,
        }
        filtered = bool((settings["top_k"] < layout.image_vocab).any() or (settings["top_p"] < 1).any())
        guided = bool((guidance_B != 1).any())
        if guided:
            text_CT = np.concatenate([text_CT, np.tile(layout.text_slots([]), (captions, 1))])
        given_CI = np.zeros((captions, layout.image_len), np.int32) if given_CI is None else np.asarray(given_CI)
        keys_B, ids_IB = keys_CM.reshape(-1), np.repeat(given_CI, candidates, axis=0).T
        how = (self.config, self.mesh, guided)
        arrays = _begin(how, self._weights, jnp.asarray(text_CT), keys_B, jnp.asarray(ids_IB), settings)
        return {"arrays": arrays, "flags": (filtered, guided), "shape": (captions, candidates)}

    def advance(self, wave: Wave, first_row: int, last_row: int) -> Wave:
        """The wave with rows first_row .. last_row - 1 drawn; rows come in order, each once."""
        how = (self.config, self.mesh, *wave["flags"])
        arrays = _advance(how, self._weights, wave["arrays"], np.int32(first_row), np.int32(last_row))
        return wave | {"arrays": arrays}

    def ids(self, wave: Wave) -> np.ndarray:
        """int32 [C, M, I]: the codes of all images; those of rows that are not drawn yet are as given, or zero."""
        return np.asarray(wave["arrays"]["ids"]).T.reshape(*wave["shape"], -1)

    def generate(self, text_CT, keys_CM, **settings) -> np.ndarray:
        """All rows of a wave at once: `begin`, `advance`, `ids`."""
        return self.ids(self.advance(self.begin(text_CT, keys_CM, **settings), 0, self.config.grid))

    def compile(
        self, captions: int, candidates: int, *, guided: bool = False, filtered: bool = False
    ) -> dict[str, jax.stages.Compiled]:
        """The programs of `begin` and `advance` for waves of this shape, compiled for the mesh and not run."""
        config, images, everywhere = self.config, captions * candidates, sharding.replicated(self.mesh)
        of = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)  # noqa: E731
        settings = dict.fromkeys(("temperature", "top_p", "guidance"), of(images, dtype=jnp.float32))
        settings |= dict.fromkeys(("top_k", "given"), of(images))
        text_CT = of(captions * (2 if guided else 1), config.text_len)
        keys_B, ids_IB = of(images, dtype=jax.random.key(0).dtype), of(config.layout.image_len, images)
        how = (config, self.mesh, guided)
        begin = _begin.lower(how, self._weights, text_CT, keys_B, ids_IB, settings)
        begun = begin.compile()
        arrays = _abstract(begin.out_info, begun.output_shardings)
        how = (config, self.mesh, filtered, guided)
        return {"begin": begun, "advance": _advance.lower(how, self._weights, arrays, of(), of()).compile()}

    def weight_bytes(self) -> int:
        """Of all weights, once, on however many devices they lie."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._weights))

    def wave_bytes(self, captions: int, candidates: int, *, guided: bool) -> int:
        """Bytes that a wave of this shape holds or makes at a time on all devices together: text and image stores,
        noise of a row, logits. Weights are not in it."""
        config, streams = self.config, 2 if guided else 1
        images = captions * candidates
        text = jax.eval_shape(
            lambda w, t: decoding.prefill(config, *w, t),
            self._weights,
            jax.ShapeDtypeStruct((captions * streams, config.text_len), jnp.int32),
        )
        stores = jax.eval_shape(lambda: decoding.empty_cache(config, images * streams))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((text, stores)))
        repeated = self.mesh.size // self.ways  # of what is not cut along heads
        return held + repeated * 4 * images * config.image_vocab * (config.grid + 4 * streams)


_END_PARAMS = (
    "text_embedding",
    "text_position",
    "image_embedding",
    "row_position",
    "column_position",
    "norm_gain",
    "norm_bias",
    "image_head",
)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _layer_weights(config: TransformerConfig, block, weights: str):
    return decoding.layer_weights(config, block, weights=weights)


@functools.partial(jax.jit, static_argnums=0)
def _end_weights(config: TransformerConfig, params):
    return decoding.end_weights(config, params)


def _abstract_weights(model: Model, mesh: Mesh, weights: str):
    """What `Engine` holds, as jax.ShapeDtypeStruct with shardings."""
    block = {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in model.abstract["blocks"].items()}
    layer = jax.eval_shape(lambda block: _layer_weights(model.config, block, weights), block)
    ends = jax.eval_shape(lambda params: _end_weights(model.config, params), model.abstract)
    layer, ends = (
        _abstract(tree, _places(tree, axes, mesh))
        for tree, axes in ((layer, decoding.LAYER_AXES), (ends, decoding.END_AXES))
    )
    return [layer] * model.config.num_layers, ends


def _abstract(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _places(weights, axes, mesh: Mesh):
    """Shardings of weights; a scale of int8 weights lies like the outputs of its matrix, the leading dimensions."""

    def place(path, leaf):
        names = axes[path[0].key][: leaf.ndim]
        return jax.sharding.NamedSharding(mesh, sharding.spec(leaf.shape, names, mesh))

    return jax.tree_util.tree_map_with_path(place, weights)


@functools.partial(jax.jit, static_argnums=0)
def _begin(how, weights, text_CT, keys_B, ids_IB, settings):
    config, mesh, guided = how
    with sharding.use(mesh):
        images = keys_B.size * (2 if guided else 1)
        return {
            "stores": decoding.prefill(config, *weights, text_CT),
            "cache": decoding.empty_cache(config, images),
            "ids": ids_IB,
            "previous": jnp.full(keys_B.shape, config.layout.start_of_image, jnp.int32),
            "keys": keys_B,
            "settings": settings,
        }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(how, weights, arrays, first_row, last_row):
    config, mesh, filtered, guided = how
    settings, keys_B, vocab = arrays["settings"], arrays["keys"], config.image_vocab

    def choose(logits_VB, noise_BV):
        logits_BV = logits_VB.T
        if guided:
            conditional, unconditional = jnp.split(logits_BV, 2)
            logits_BV = guide(conditional, unconditional, settings["guidance"][:, None])
        limits = {"top_k": settings["top_k"], "top_p": settings["top_p"]} if filtered else {}
        return draw(filter_logits(logits_BV, temperature=settings["temperature"], **limits), noise_BV)

    def one_row(row, arrays):
        position_G = row * config.grid + jnp.arange(config.grid)
        # A row's noise at once: a few positions' worth is too little work for a program of its own.
        noise_GBV = jax.vmap(lambda p: jax.vmap(lambda key: noise(key, p, vocab))(keys_B))(position_G)
        noise_GBV = sharding.constrain(noise_GBV, (None, "batch", None))
        given_GB = jax.lax.dynamic_slice_in_dim(arrays["ids"], row * config.grid, config.grid)

        def one_position(carry, inputs):
            previous_B, cache = carry
            position, noise_BV, given_B = inputs
            twice = jnp.tile(previous_B, 2 if guided else 1)
            logits, cache = decoding.decode(config, *weights, arrays["stores"], cache, twice, position)
            drawn_B = jnp.where(position < settings["given"], given_B, choose(logits, noise_BV))
            return (drawn_B, cache), drawn_B

        carry = arrays["previous"], arrays["cache"]
        (previous_B, cache), row_GB = jax.lax.scan(one_position, carry, (position_G, noise_GBV, given_GB))
        ids_IB = jax.lax.dynamic_update_slice_in_dim(arrays["ids"], row_GB, row * config.grid, axis=0)
        return arrays | {"ids": ids_IB, "previous": previous_B, "cache": cache}

    with sharding.use(mesh):
        return jax.lax.fori_loop(first_row, last_row, one_row, arrays)
