"""DALL-E mini and mega as min-dalle (PyTorch) and dalle-mini (Flax) store them, in terms of `models.seq2seq`.

Sizes are inferred from the arrays; a head has 64 numbers. What arrays do not say is given. Norms whose scale is not
stored, those before a matrix in Flax's files, have scales of ones.
"""

import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import model_dir
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
    state: Mapping[str, np.ndarray],
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
    params: Params = {}
    for path, theirs in names(config).items():
        parts = [_take(arrays, name) for name in theirs]
        if len({part.shape for part in parts}) > 1:
            raise UserError(
                f"expected arrays of one shape, got others in {theirs[0]} and its like: fetch the file again"
            )
        *keys, leaf = path
        node = params
        for key in keys:
            node = node.setdefault(key, {})
        node[leaf] = _ours(leaf, parts, config)
    if arrays:
        raise UserError(f"expected DALL-E mini alone in {layout}'s names, got {min(arrays)} too: remove what is not it")
    model_dir.check_params(params, model(config).abstract, where="the state dict")
    return config, params


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


def _ours(leaf: str, parts: list[np.ndarray], config: Seq2SeqConfig) -> np.ndarray:
    """One parameter from its parts, matrices of which are [outputs, inputs]."""
    if leaf == "head":
        return np.ascontiguousarray(parts[0].T)
    if leaf not in DECODER_LAYER:
        return parts[0]
    if leaf not in _MATRICES:
        return np.stack(parts)
    sizes = {"embed": config.width, "heads": config.heads, "head": config.head_size, "mlp": config.mlp}
    joined = len(_MATRICES[leaf])
    matrix = np.stack([part.T for part in parts])  # [layers * parts, inputs, outputs]
    if joined > 1:
        matrix = matrix.reshape(-1, joined, *matrix.shape[1:]).swapaxes(1, 2)
    shape = (joined if axis == "qkv" else sizes[axis] for axis in DECODER_LAYER[leaf].axes)
    try:
        return np.ascontiguousarray(matrix).reshape(-1, *shape)
    except ValueError as error:
        raise UserError(f"expected matrices for {leaf} of the model's width, got {parts[0].shape}") from error


def _take(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"expected a whole DALL-E mini, but {name} is missing: fetch the file again")
    array = np.asarray(arrays.pop(name), np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"expected finite weights, got others in {name}: fetch the file again")
    return array


def _infer_config(arrays: Mapping[str, np.ndarray], *, heads, start, image_vocab) -> Seq2SeqConfig:
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


def _from_flax(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flax's arrays by min-dalle's names, as [outputs, inputs], with the scales that are not stored."""
    arrays: dict[str, np.ndarray] = {}
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
