"""The dVAE that OpenAI released (PyPI package `DALL-E`): its names and sizes in terms of `models.dvae`.

Sizes are inferred from the arrays, so networks of the same family but another width, depth or vocabulary convert too.
"""

import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import model_dir
from dalle_jax.convert import weights
from dalle_jax.errors import UserError
from dalle_jax.models import Params, dvae

_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")
_LEAVES = {"w": "weight", "b": "bias"}


def convert(
    encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray], *, image_size: int = 256
) -> tuple[dvae.DVAEConfig, Params]:
    """Config and parameters (numpy float32) from the state dicts of the released encoder and decoder.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than the sizes of the rest ask for.
    """
    config = _infer_config(encoder, decoder, image_size)
    state = {f"encoder.{name}": array for name, array in encoder.items()}
    state |= {f"decoder.{name}": array for name, array in decoder.items()}
    params = weights.renamed(state, _path_of)
    model_dir.check_params(params, dvae.model(config).abstract, where="the state dicts of one encoder and its decoder")
    return config, params


def _path_of(name: str) -> list[str]:
    """'encoder.blocks.group_1.block_2.res_path.conv_3.w' -> encoder, tower, group_1_block_2, conv_3, weight."""
    network, _, rest = name.partition(".")
    rest, _, leaf = rest.rpartition(".")
    rest = rest.replace("res_path.", "").replace("id_path", "skip")
    rest = {"blocks.input": "stem", "blocks.output.conv": "head"}.get(rest, rest)
    rest = _BLOCK.sub(r"tower.group_\1_block_\2.", rest)
    return [network, *rest.split("."), _LEAVES.get(leaf, leaf)]


def _infer_config(encoder, decoder, image_size: int) -> dvae.DVAEConfig:
    try:
        blocks = [tuple(map(int, found.groups())) for name in encoder if (found := _BLOCK.match(name))]
        stem = encoder["blocks.input.w"]
        return dvae.DVAEConfig(
            image_size=image_size,
            vocab=encoder["blocks.output.conv.w"].shape[0],
            width=stem.shape[0],
            groups=max(group for group, _ in blocks),
            blocks_per_group=max(block for _, block in blocks),
            stem=decoder["blocks.input.w"].shape[0],
            stem_kernel=stem.shape[2],
        )
    except (KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"expected the state dicts of a released encoder and decoder, but {error} is missing"
        ) from error
    except ValueError as error:  # no block at all, or sizes that no config allows
        raise UserError(f"these state dicts and image size do not make a dVAE: {error}") from error
