"""DALL-E mini and mega as min-dalle (PyTorch) and dalle-mini (Flax) store them, in terms of `models.seq2seq`.

Sizes are inferred from the arrays; a head has 64 numbers. What arrays do not say is given. Norms whose scale is not
stored, those before a matrix in Flax's files, have scales of ones.
"""

import re

import numpy as np
from flax.traverse_util import unflatten_dict

from dalle_jax.convert import weights
from dalle_jax.convert.stored import Array, State
from dalle_jax.errors import UserError
from dalle_jax.models import Params
from dalle_jax.models.seq2seq import DECODER_LAYER, ENCODER_LAYER, Seq2SeqConfig, model

LAYOUTS = ("min-dalle", "dalle-mini")
HEAD_SIZE = 64
START = 16_383  # what min-dalle feeds first
_TABLES = {"encoder": ENCODER_LAYER, "decoder": DECODER_LAYER}
_MATRICES = {  # ours -> parts of which ours is made, as min-dalle names them
    "self_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_out": ("self_attn.out_proj",),
    "cross_q": ("encoder_attn.q_proj",),
    "cross_kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross_out": ("encoder_attn.out_proj",),
    "gate": ("glu.fc0",),
    "up": ("glu.fc1",),
    "down": ("glu.fc2",),
}
_NORMS = {
    "self_norm": "pre_self_attn_layer_norm",
    "self_post": "self_attn_layer_norm",
    "cross_norm": "pre_encoder_attn_layer_norm",
    "cross_post": "encoder_attn_layer_norm",
    "glu_norm": "glu.ln0",
    "glu_inner": "glu.ln1",
}
_ENDS = {"embedding_norm": "layernorm_embedding", "final_norm": "final_ln"}
_FLAX = {  # of a layer: min-dalle's -> Flax's; the longest names first
    "glu.ln": "GLU_0.LayerNorm_",
    "glu.fc": "GLU_0.Dense_",
    "self_attn": "FlaxBartAttention_0",
    "encoder_attn": "FlaxBartAttention_1",
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn_layer_norm": "LayerNorm_3",
}


def convert(
    state: State,
    layout: str,
    *,
    heads: int | None = None,
    start: int = START,
    image_vocab: int | None = None,
) -> tuple[Seq2SeqConfig, Params]:
    """Config and parameters (numpy float32) from a model's arrays.

    state: name -> array. layout: whose names, one of LAYOUTS. 'min-dalle': those of encoder.pt behind 'encoder.' and
    of decoder.pt behind 'decoder.'; 'dalle-mini': the keys of Flax's tree joined by dots. heads: by default width / 64.
    start: what the decoder reads first, `decoder_start_token_id` of dalle-mini's config.json. image_vocab: tokens
    of the image tokenizer, by default the largest power of two that the image embedding has rows for.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than the rest asks for.
    """
    arrays = _from_flax(state) if layout == "dalle-mini" else dict(state)
    try:
        config = _infer_config(arrays, heads=heads, start=start, image_vocab=image_vocab)
    except KeyError as error:
        raise UserError(
            f"expected DALL-E mini in {layout}'s names, but {error} is missing: give another file"
        ) from error
    except ValueError as error:
        raise UserError(f"these arrays and settings do not make a DALL-E mini: {error}") from error
    paths, leaves = names(config), weights.leaves(model(config).abstract)
    shapes = {name: _shape(path, leaves[path].shape, config) for path, theirs in paths.items() for name in theirs}
    weights.check_names(arrays, shapes, what=f"a whole DALL-E mini in {layout}'s names")
    params = {}
    for path, theirs in paths.items():
        last = path[-1]
        if "blocks" in path:
            parts, matrix = _parts(last), last in _MATRICES
            layers = [theirs[i : i + parts] for i in range(0, len(theirs), parts)]
            array = weights.stacked(arrays, layers, leaves[path].shape[1:], matrix=matrix)
        else:
            array = weights.finite(theirs[0], arrays.pop(theirs[0]))
        params[path] = np.ascontiguousarray(array.T if last == "head" else array, np.float32)
    return config, unflatten_dict(params)


def names(config: Seq2SeqConfig) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Every parameter: its path -> the names in min-dalle's layout of what it is made of, a layer's parts together."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {("head",): ("decoder.lm_head.weight",)}
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        found[stack, "embedding"] = (f"{stack}.embed_tokens.weight",)
        found[stack, "position"] = (f"{stack}.embed_positions.weight",)
        for norm, theirs in _ENDS.items():
            found[stack, f"{norm}_gain"] = (f"{stack}.{theirs}.weight",)
            found[stack, f"{norm}_bias"] = (f"{stack}.{theirs}.bias",)
        for name in _TABLES[stack]:
            if name in _MATRICES:
                parts = [f"{part}.weight" for part in _MATRICES[name]]
            else:
                norm, _, kind = name.rpartition("_")
                parts = [f"{_NORMS[norm]}.{'weight' if kind == 'gain' else kind}"]
            found[stack, "blocks", name] = tuple(f"{stack}.layers.{i}.{part}" for i in range(layers) for part in parts)
    return found


def _parts(name: str) -> int:
    """The number of arrays that one layer's parameter is made of."""
    return len(_MATRICES.get(name, (name,)))


def _shape(path: tuple[str, ...], shape: tuple[int, ...], config: Seq2SeqConfig) -> tuple[int, ...]:
    """The shape of an array of the file, of those that make a parameter of this path and shape."""
    if "blocks" not in path:
        return shape[::-1] if path == ("head",) else shape
    inputs = None if path[-1] not in _MATRICES else config.mlp if path[-1] == "down" else config.width
    return weights.joined_shape(shape[1:], parts=_parts(path[-1]), inputs=inputs)


def _infer_config(arrays: State, *, heads, start, image_vocab) -> Seq2SeqConfig:
    def layers(stack):
        return len({m[1] for name in arrays if (m := re.match(rf"{stack}\.layers\.(\d+)\.", name))})

    text_vocab, width = arrays["encoder.embed_tokens.weight"].shape
    image_ids = arrays["decoder.embed_tokens.weight"].shape[0]
    positions = arrays["decoder.embed_positions.weight"].shape[0]
    return Seq2SeqConfig(
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        width=width,
        heads=heads or width // HEAD_SIZE,
        mlp=arrays["encoder.layers.0.glu.fc0.weight"].shape[0],
        text_len=arrays["encoder.embed_positions.weight"].shape[0],
        text_vocab=text_vocab,
        grid=round(positions**0.5),
        image_vocab=image_vocab or 1 << (image_ids.bit_length() - 1),
        image_ids=image_ids,
        start=start,
    )


def _from_flax(state: State) -> dict[str, Array]:
    """Flax's arrays by min-dalle's names, as [outputs, inputs], with the scales that are not stored."""
    arrays: dict[str, Array] = {}
    for name, array in state.items():
        array = np.asarray(array)
        name = "decoder." + name if name.startswith("lm_head.") else name.removeprefix("model.")
        for theirs, flax in _FLAX.items():
            name = name.replace(
                f".{flax}" if flax.endswith("_") else f".{flax}.", f".{theirs}" + "." * (flax[-1] != "_")
            )
        if name.endswith(".kernel"):
            array = array.swapaxes(-1, -2)
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        found = re.fullmatch(r"(encoder|decoder)\.(?:layers\.)?FlaxBart(?:En|De)coderLayer(s|_\d+)\.(.*)", name)
        if found is None:
            arrays[name] = array
        elif found[2] == "s":
            arrays |= {f"{found[1]}.layers.{i}.{found[3]}": one for i, one in enumerate(array)}
        else:
            arrays[f"{found[1]}.layers.{found[2][1:]}.{found[3]}"] = array
    for name in [name for name in arrays if name.endswith(".bias")]:
        arrays.setdefault(f"{name[:-5]}.weight", np.ones_like(arrays[name]))
    return arrays
