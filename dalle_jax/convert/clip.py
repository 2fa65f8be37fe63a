"""CLIP as OpenAI and Hugging Face publish it (safetensors, vision transformers): its names in terms of `models.clip`.

Knows the two namings (`vision_model.encoder.layers.0...`, `visual.transformer.resblocks.0...`). Sizes are inferred from
the arrays; what arrays do not say (heads, activation, pixel statistics) comes from config.json and
preprocessor_config.json beside them, or is the released models'.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle_jax import model_dir
from dalle_jax.convert import weights
from dalle_jax.convert.stored import State
from dalle_jax.errors import UserError, check_number, first_line
from dalle_jax.models import Params, clip
from dalle_jax.text.clip import CLIPTokenizer

HEAD_SIZE = 64  # of every released model
ACTIVATION = "quick_gelu"
EPSILON = 1e-5
MAX_HEADS = 65_536
MAX_PIXEL = 1_000  # of the mean and deviation of pixels in [0, 1]

# Buffers, not parameters.
_IGNORED = re.compile(r".*position_ids|input_resolution|context_length|vocab_size")
# From OpenAI's names to Hugging Face's, in this order.
_OPENAI_NAMES = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# From our names to Hugging Face's.
_IMAGE = {
    "patch": "vision_model.embeddings.patch_embedding.weight",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "position": "vision_model.embeddings.position_embedding.weight",
    "norm_before_gain": "vision_model.pre_layrnorm.weight",
    "norm_before_bias": "vision_model.pre_layrnorm.bias",
    "norm_gain": "vision_model.post_layernorm.weight",
    "norm_bias": "vision_model.post_layernorm.bias",
    "projection": "visual_projection.weight",
}
_TEXT = {
    "embedding": "text_model.embeddings.token_embedding.weight",
    "position": "text_model.embeddings.position_embedding.weight",
    "norm_gain": "text_model.final_layer_norm.weight",
    "norm_bias": "text_model.final_layer_norm.bias",
    "projection": "text_projection.weight",
}
_LAYER = {
    "norm1_gain": "layer_norm1.weight",
    "norm1_bias": "layer_norm1.bias",
    "out": "self_attn.out_proj.weight",
    "out_bias": "self_attn.out_proj.bias",
    "norm2_gain": "layer_norm2.weight",
    "norm2_bias": "layer_norm2.bias",
    "up": "mlp.fc1.weight",
    "up_bias": "mlp.fc1.bias",
    "down": "mlp.fc2.weight",
    "down_bias": "mlp.fc2.bias",
}


def load_published(
    source: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None
) -> tuple[clip.CLIPConfig, Params, CLIPTokenizer]:
    """Config, parameters and tokenizer of a published file or folder.

    tokenizer: a merge list or a folder with a vocabulary; default: beside the weights.

    Raises:
      UserError: a part is missing or unreadable, or the tokenizer has another size than the weights.
    """
    source = pathlib.Path(source)
    folder = source if source.is_dir() else source.parent
    config, params = convert(weights.read(source), **read_settings(folder))
    found = CLIPTokenizer.load(tokenizer or folder)
    if found.vocab_size != config.text_vocab:
        raise UserError(
            f"expected a vocabulary of {config.text_vocab} entries besides the start and end marks, as in the weights, "
            f"got {found.vocab_size} in {tokenizer or folder}: give the one that belongs to them as --tokenizer"
        )
    return config, params, found


def read_settings(folder: pathlib.Path) -> dict:
    """Keyword arguments of `convert` from the json files that Hugging Face puts beside the weights, if any.

    Raises:
      UserError: not json, or a model that computes something else than the released ones.
    """
    settings: dict[str, Any] = {}
    found = _json(folder / "config.json")
    for tower, key in (("image", "vision_config"), ("text", "text_config")):
        part = found.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"expected {key} of {folder / 'config.json'} to be an object, got {part!r}: mend it")
        for name, wanted in (("hidden_act", ACTIVATION), ("layer_norm_eps", EPSILON)):
            if part.get(name, wanted) != wanted:
                raise UserError(
                    f"expected {name} = {wanted} in {key} of {folder / 'config.json'}, as in the released CLIP, got "
                    f"{part[name]}: this model cannot be imported"
                )
        if "num_attention_heads" in part:
            settings[f"{tower}_heads"] = heads = part["num_attention_heads"]
            check_number(f"num_attention_heads in {key} of {folder}", heads, min=1, max=MAX_HEADS, whole=True)
    pixels = _json(folder / "preprocessor_config.json")
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in pixels:
            values = pixels[theirs]
            if not isinstance(values, list) or len(values) != 3:
                raise UserError(f"expected three numbers as {theirs} in {folder}, got {values!r}: mend it")
            for value in values:
                check_number(f"{theirs} in {folder}", value, min=-MAX_PIXEL if ours == "mean" else 1e-6, max=MAX_PIXEL)
            settings[ours] = tuple(values)
    return settings


def _json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"expected json in {path}, got {first_line(error)}: mend it") from error
    return found if isinstance(found, dict) else {}


def convert(state: State, **settings) -> tuple[clip.CLIPConfig, Params]:
    """Config and parameters (numpy float32) from a state dict in either naming.

    settings: fields of CLIPConfig that arrays do not say: image_heads, text_heads (default: heads of 64), mean, std.

    Raises:
      UserError: an array is missing, left over or of another shape than the rest asks for, or the sizes do not fit.
    """
    try:
        state = _named_as_hugging_face(state)
        config = _infer_config(state, settings)
        params = _params(state, config)
    except KeyError as error:
        raise UserError(f"expected the state dict of a CLIP with two transformers, but {error} is missing") from error
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"these arrays do not make a CLIP with two transformers: {error}") from error
    if state:
        raise UserError(f"expected the state dict of a CLIP alone, got {sorted(state)[0]} too: remove what is not CLIP")
    model_dir.check_params(params, clip.model(config).abstract, where="the state dict")
    return config, params


def _named_as_hugging_face(state: State) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in state.items():
        if _IGNORED.fullmatch(name):
            continue
        for pattern, replacement in _OPENAI_NAMES:
            name = re.sub(pattern, replacement, name)
        array = np.asarray(weights.finite(name, array), np.float32)
        if ".attn.in_proj_" in name:  # one matrix for queries, keys and values
            prefix, kind = name.split(".attn.in_proj_")
            for part, piece in zip("qkv", np.split(array, 3), strict=True):
                renamed[f"{prefix}.self_attn.{part}_proj.{kind}"] = piece
        elif name == "visual.proj":
            renamed["visual_projection.weight"] = array.T
        elif name == "text_projection":
            renamed["text_projection.weight"] = array.T
        else:
            renamed[name] = array
    return renamed


def _infer_config(state: Mapping[str, np.ndarray], settings: Mapping) -> clip.CLIPConfig:
    image_width, _, patch, _ = state[_IMAGE["patch"]].shape
    text_ids, text_width = state[_TEXT["embedding"]].shape
    grid = round((len(state[_IMAGE["position"]]) - 1) ** 0.5)
    sizes = {
        "embed": len(state["visual_projection.weight"]),
        "image_size": grid * patch,
        "patch": patch,
        "image_layers": _count_layers(state, "vision_model"),
        "image_width": image_width,
        "image_heads": image_width // HEAD_SIZE,
        "text_len": len(state[_TEXT["position"]]),
        "text_vocab": text_ids - 2,
        "text_layers": _count_layers(state, "text_model"),
        "text_width": text_width,
        "text_heads": text_width // HEAD_SIZE,
    }
    return clip.CLIPConfig(**{**sizes, **settings})


def _count_layers(state: Mapping[str, np.ndarray], tower: str) -> int:
    pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    return 1 + max((int(found.group(1)) for name in state if (found := pattern.match(name))), default=-1)


def _params(state: dict[str, np.ndarray], config: clip.CLIPConfig) -> Params:
    """Takes every array that it uses out of `state`; torch keeps matrices as [outputs, inputs]."""
    image: dict[str, Any] = {ours: state.pop(theirs) for ours, theirs in _IMAGE.items()}
    image["patch"] = image["patch"].transpose(2, 3, 1, 0).reshape(-1, config.image_width)
    image["class_embedding"] = image["class_embedding"][None]
    text: dict[str, Any] = {ours: state.pop(theirs) for ours, theirs in _TEXT.items()}
    for part in (image, text):
        part["projection"] = part["projection"].T
    image["blocks"] = _blocks(state, "vision_model", layers=config.image_layers, heads=config.image_heads)
    text["blocks"] = _blocks(state, "text_model", layers=config.text_layers, heads=config.text_heads)
    return {"image": image, "text": text, "log_scale": state.pop("logit_scale").reshape(1)}


def _blocks(state: dict[str, np.ndarray], tower: str, *, layers: int, heads: int) -> Params:
    """All layers of a tower, stacked."""
    every = [_layer(state, f"{tower}.encoder.layers.{index}", heads) for index in range(layers)]
    return {name: np.stack([layer[name] for layer in every]) for name in every[0]}


def _layer(state: dict[str, np.ndarray], prefix: str, heads: int) -> Params:
    layer = {ours: state.pop(f"{prefix}.{theirs}") for ours, theirs in _LAYER.items()}
    for name in ("out", "up", "down"):
        layer[name] = layer[name].T
    width = len(layer["up"])
    layer["out"] = layer["out"].reshape(heads, -1, width)
    matrices = [state.pop(f"{prefix}.self_attn.{part}_proj.weight").T for part in "qkv"]
    biases = [state.pop(f"{prefix}.self_attn.{part}_proj.bias") for part in "qkv"]
    layer["qkv"] = np.stack(matrices, axis=1).reshape(width, 3, heads, -1)
    layer["qkv_bias"] = np.stack(biases).reshape(3, heads, -1)
    return layer
