"""The dVAE that OpenAI released (PyPI package `DALL-E`): its names and sizes in terms of `models.dvae`.

Sizes are inferred from the arrays, so networks of the same family but another width, depth or vocabulary convert too.
"""

import re

from dalle_jax.convert import weights
from dalle_jax.convert.stored import State
from dalle_jax.errors import UserError
from dalle_jax.models import Params, dvae

_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")
# Ours -> theirs, in this order.
_NAMES = (
    (r"\.tower\.group_(\d+)_block_(\d+)\.", r".blocks.group_\1.block_\2."),
    (r"\.stem\.", ".blocks.input."),
    (r"\.head\.", ".blocks.output.conv."),
    (r"\.skip\.", ".id_path."),
    (r"\.(conv_\d+)\.", r".res_path.\1."),
    (r"\.(w)eight$|\.(b)ias$", r".\1\2"),
)


def convert(encoder: State, decoder: State, *, image_size: int = 256) -> tuple[dvae.DVAEConfig, Params]:
    """Config and parameters (numpy float32) from the state dicts of the released encoder and decoder.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than the sizes of the rest ask for.
    """
    config = _infer_config(encoder, decoder, image_size)
    state = {f"encoder.{name}": array for name, array in encoder.items()}
    state |= {f"decoder.{name}": array for name, array in decoder.items()}
    abstract = dvae.model(config).abstract
    names = {path: _name(".".join(path)) for path in weights.leaves(abstract)}
    params = weights.renamed(state, names, abstract, what="the state dicts of one encoder and its decoder")
    return config, params


def _name(path: str) -> str:
    """'encoder.tower.group_1_block_2.conv_3.weight' -> 'encoder.blocks.group_1.block_2.res_path.conv_3.w'."""
    for pattern, replacement in _NAMES:
        path = re.sub(pattern, replacement, path)
    return path


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
