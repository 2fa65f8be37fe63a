"""An engine without weights: it counts bytes and compiles for devices that are not here."""

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax import sharding
from dalle_jax.models import decoding
from dalle_jax.sample import engine
from dalle_jax.sample.engine import Engine, Program


class AbstractEngine(Engine):
    """`Engine` whose weights are shapes with shardings."""

    def __init__(self, model, *, mesh, weights: str = "model"):
        self.config, self.mesh = model.config, mesh
        block = {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in model.abstract["blocks"].items()}
        layer = jax.eval_shape(lambda block: engine._layer_weights(model.config, block, weights=weights), block)
        ends = jax.eval_shape(lambda params: engine._end_weights(model.config, params), model.abstract)
        layer, ends = (
            _with_places(tree, engine._places(tree, axes, mesh))
            for tree, axes in ((layer, decoding.LAYER_AXES), (ends, decoding.END_AXES))
        )
        self._weights = [layer] * model.config.num_layers, ends

    def compile(
        self, prompts: int, candidates: int, *, guided: bool = False, filtered: bool = False
    ) -> dict[str, jax.stages.Compiled]:
        """The programs of `begin` and `advance` for batches of this shape, compiled for the mesh and not run."""
        config, images, everywhere = self.config, prompts * candidates, sharding.replicated(self.mesh)

        def of(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

        settings = dict.fromkeys(("temperature", "top_p", "guidance"), of(images, dtype=jnp.float32))
        settings |= dict.fromkeys(("top_k", "given"), of(images))
        text_PT = of(prompts * (2 if guided else 1), config.text_len)
        keys_B, tokens_IB = of(images, dtype=jax.random.key(0).dtype), of(config.layout.image_len, images)
        program = Program(config, self.mesh, guided=guided, filtered=filtered)
        begin = engine._begin.lower(
            dataclasses.replace(program, filtered=False), self._weights, text_PT, keys_B, tokens_IB, settings
        )
        begun = begin.compile()
        arrays = _with_places(begin.out_info, begun.output_shardings)
        advance = engine._advance.lower(
            dataclasses.replace(program, filtered=filtered), self._weights, arrays, of(), of()
        )
        return {"begin": begun, "advance": advance.compile()}


def weight_bytes(held: Engine) -> int:
    """Bytes of all weights, counted once, on however many devices they lie."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held._weights))


def _with_places(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
