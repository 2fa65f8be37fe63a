"""The dVAE that OpenAI released (PyPI package `DALL-E`) as a model directory of this package.

Knows the released names and layouts (torch: output channels, input channels, height, width) of its two state dicts.
Sizes are inferred, so networks of the same family but another width, depth or vocabulary convert too.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping

import jax
import numpy as np

from dalle_jax import model_dir
from dalle_jax.convert.state_dict import read_state_dict
from dalle_jax.errors import UserError
from dalle_jax.models import Params, dvae

_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")
_LEAVES = {"w": "weight", "b": "bias"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", required=True, metavar="FILE", help="state dict of the encoder")
    parser.add_argument("--decoder", required=True, metavar="FILE", help="state dict of the decoder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model directory is written")
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side it is used at (default: 256)")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read files that hold a whole pickled module; such a file can run any code, so trust its origin",
    )


def main(args: argparse.Namespace) -> int:
    if os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"expected --out to be a new or empty directory, got {args.out}: choose another")
    encoder = read_state_dict(args.encoder, allow_pickle=args.allow_pickle)
    decoder = read_state_dict(args.decoder, allow_pickle=args.allow_pickle)
    config, params = convert(encoder, decoder, image_size=args.image_size)
    model_dir.save(args.out, {"name": "dvae", "model": dataclasses.asdict(config)}, params)
    print(f"{dvae.model(config).num_params:,} parameters, {config.vocab} codes, {config.grid} x {config.grid} grid")
    print(f"written to {args.out}")
    return 0


def convert(
    encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray], *, image_size: int = 256
) -> tuple[dvae.DVAEConfig, Params]:
    """Released state dicts -> config and parameters (numpy float32) of `models.dvae`.

    Raises:
      UserError: an array is missing, left over or of another shape than the sizes of the rest ask for.
    """
    config = _infer_config(encoder, decoder, image_size)
    state = {f"encoder.{name}": array for name, array in encoder.items()}
    state |= {f"decoder.{name}": array for name, array in decoder.items()}
    params: Params = {}
    for name, array in state.items():
        *path, leaf = _our_path(name)
        node = params
        for key in path:
            node = node.setdefault(key, {})
        array = np.asarray(array, np.float32)
        node[leaf] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    got = _shapes(params)
    want = _shapes(dvae.model(config).abstract)
    for path in sorted(want.keys() | got.keys()):
        if want.get(path) != got.get(path):
            raise UserError(
                f"expected {path} of shape {want.get(path)}, got {got.get(path)}: these state dicts are not one "
                "encoder and its decoder of the released family"
            )
    return config, params


def _our_path(name: str) -> list[str]:
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


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
