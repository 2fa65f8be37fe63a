"""VQGANs as taming-transformers and LlamaGen store them: their names and sizes in terms of `models.vq`.

taming's names are also those of minDALL-E's first stage, of Sber's Gumbel VQGAN and of latent-diffusion's. LlamaGen
numbers the decoder's levels from the coarsest, and its codes have length 1. Sizes are inferred from the arrays; what
arrays do not say, the size of the images and the range of the pixels, is given.
"""

import re

from dalle_jax.convert import weights
from dalle_jax.convert.stored import State
from dalle_jax.errors import UserError
from dalle_jax.models import Params
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.model import model

LAYOUTS = ("taming", "llamagen")
# What only training needs (discriminator, LPIPS), and LlamaGen's record of the codes that it has seen.
_IGNORED = re.compile(r"loss\..*|quantize\.codebook_used")
# Ours -> theirs, in this order, in both layouts.
_COMMON = (
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.conv_([12])\.", r".conv\1."),
    (r"\.skip\.", ".nin_shortcut."),
    (r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.", r".\1\2\3."),
    (r"\.out\.", ".proj_out."),
    (r"gain$", "weight"),
    (r"^quantizer\.projection\.", "quantize.proj."),
)
_PARTS = {  # of a level
    "taming": {"block": "block", "attention": "attn", "down": "downsample.conv", "up": "upsample.conv"},
    "llamagen": {"block": "res", "attention": "attn", "down": "downsample.conv", "up": "upsample.conv"},
}
_MIDDLE = {
    "taming": {"block_1": "block_1", "attention": "attn_1", "block_2": "block_2"},
    "llamagen": {"block_1": "0", "attention": "1", "block_2": "2"},
}
_LEVEL = re.compile(r"^(encoder|decoder)\.level_(\d+)_(block|attention|down|up)(?:_(\d+))?\.")


def convert(
    state: State, layout: str, *, image_size: int = 256, pixel_range: str = "symmetric"
) -> tuple[VQConfig, Params]:
    """Config and parameters (numpy float32) from a state dict.

    layout: whose names these are, one of LAYOUTS. image_size: pixels per side it is used at. pixel_range: of its
    images, one of `pixels.RANGES`.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than the rest asks for, or the image
        size does not fit.
    """
    config = _infer_config(state, layout, image_size=image_size, pixel_range=pixel_range)
    kept = {name: array for name, array in state.items() if not _IGNORED.fullmatch(name)}
    what = f"a whole VQGAN in {layout}'s names"
    params = weights.renamed(kept, names(config, layout), model(config).abstract, what=what)
    return config, params


def names(config: VQConfig, layout: str) -> dict[tuple[str, ...], str]:
    """Every parameter of a VQGAN of these sizes: its path -> its name in a layout."""
    return {path: _name(".".join(path), config, layout) for path in weights.leaves(model(config).abstract)}


def _name(path: str, config: VQConfig, layout: str) -> str:
    if path == "quantizer.codebook":
        return "quantize.embed.weight" if config.quantizer == "gumbel" else "quantize.embedding.weight"

    def of_level(found: re.Match) -> str:
        network, level, part, index = found.groups()
        if layout == "taming":
            place = "down" if network == "encoder" else "up"
        else:
            place = "conv_blocks"
            level = level if network == "encoder" else len(config.multipliers) - 1 - int(level)
        return ".".join(word for word in (network, place, str(level), _PARTS[layout][part], index) if word) + "."

    path = _LEVEL.sub(of_level, path)
    path = re.sub(r"\.middle\.(\w+)\.", lambda found: f".mid.{_MIDDLE[layout][found[1]]}.", path)
    for pattern, replacement in _COMMON:
        path = re.sub(pattern, replacement, path)
    return path


def _infer_config(state: State, layout: str, **given) -> VQConfig:
    place, block = ("down", "block") if layout == "taming" else ("conv_blocks", "res")
    found = [re.match(rf"encoder\.{place}\.(\d+)\.{block}\.(\d+)\.", name) for name in state]
    blocks = [tuple(map(int, match.groups())) for match in found if match]
    gumbel = "quantize.proj.weight" in state
    try:
        if not blocks:
            raise KeyError(f"encoder.{place}.0.{block}.0.conv1.weight")
        width = state["encoder.conv_in.weight"].shape[0]
        levels = range(1 + max(level for level, _ in blocks))
        widths = [state[f"encoder.{place}.{level}.{block}.0.conv1.weight"].shape[0] for level in levels]
        if wrong := [channels for channels in widths if channels % width]:
            raise ValueError(f"a level has {wrong[0]} channels, no multiple of the {width} of encoder.conv_in")
        codes = state["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
        return VQConfig(
            vocab=codes.shape[0],
            code_dim=codes.shape[1],
            width=width,
            multipliers=tuple(channels // width for channels in widths),
            blocks=1 + max(index for _, index in blocks),
            attention_levels=tuple(i for i in levels if f"encoder.{place}.{i}.attn.0.q.weight" in state),
            latent=state["encoder.conv_out.weight"].shape[0],
            quantizer="gumbel" if gumbel else "nearest",
            unit_codes=layout == "llamagen",
            **given,
        )
    except KeyError as error:
        raise UserError(
            f"expected the state dict of a VQGAN in {layout}'s names, but {error} is missing: give another file"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"these arrays and this image size do not make a VQGAN: {error}") from error
