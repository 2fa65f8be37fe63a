"""CLIP as OpenAI and Hugging Face publish it (safetensors, vision transformers) as a model directory of this package.

Knows the two namings (`vision_model.encoder.layers.0...`, `visual.transformer.resblocks.0...`) and torch's layouts.
Sizes are read off the arrays; what arrays do not tell (heads, activation, pixel statistics) comes from config.json and
preprocessor_config.json beside them, or is the released models'. Pickled files are refused: they can run any code.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import model_dir
from dalle_jax.checkpoint import format
from dalle_jax.convert import state_dict
from dalle_jax.errors import UserError
from dalle_jax.models import Params, clip
from dalle_jax.text.clip import MERGES, VOCAB, CLIPTokenizer

WEIGHTS = "model.safetensors"
HEAD_SIZE = 64  # of every released model
ACTIVATION = "quick_gelu"
EPSILON = 1e-5

# Buffers, not parameters.
_IGNORED = re.compile(r".*position_ids|input_resolution|context_length|vocab_size")
# OpenAI's names are turned into Hugging Face's, in this order.
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="SAFETENSORS_OR_DIR", help=f"a file, or a folder with {WEIGHTS}")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model directory is written")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=f"bpe_simple_vocab_16e6.txt.gz, or a folder with {VOCAB} and {MERGES} (default: beside the weights)",
    )


def main(args: argparse.Namespace) -> int:
    if os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"expected --out to be a new or empty directory, got {args.out}: choose another")
    source = pathlib.Path(args.weights)
    folder = source if source.is_dir() else source.parent
    state = read_state_dict(source / WEIGHTS if source.is_dir() else source)
    config, params = convert(state, **read_settings(folder))
    tokenizer = CLIPTokenizer.load(args.tokenizer or folder)
    if tokenizer.vocab_size != config.text_vocab:
        raise UserError(
            f"expected a vocabulary of {config.text_vocab} entries beside its two marks, as the weights have, got "
            f"{tokenizer.vocab_size} in {args.tokenizer or folder}: give the one that belongs to them as --tokenizer"
        )
    tokenizer.save(args.out)
    model_dir.save(args.out, {"name": "clip", "model": dataclasses.asdict(config)}, params)
    print(
        f"{clip.model(config).num_params:,} parameters, pictures of {config.image_size} pixels in patches of "
        f"{config.patch}, vectors of {config.embed}"
    )
    print(f"written to {args.out}")
    return 0


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
      UserError: not there, not safetensors.
    """
    path = pathlib.Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(
            f"expected a .safetensors file, got {path}: pickled files (.pt, .bin) can run any code and are not read; "
            "load it where you trust it and save its state dict with safetensors.torch.save_file"
        )
    return state_dict.read_state_dict(os.fspath(path))


def read_settings(folder: pathlib.Path) -> dict:
    """Keyword arguments of `convert` from the json files that Hugging Face puts beside the weights, if any.

    Raises:
      UserError: not json, or a model that is computed otherwise than the released ones.
    """
    settings = {}
    found = _json(folder / "config.json")
    for tower, key in (("image", "vision_config"), ("text", "text_config")):
        part = found.get(key) or {}
        for name, wanted in (("hidden_act", ACTIVATION), ("layer_norm_eps", EPSILON)):
            if part.get(name, wanted) != wanted:
                raise UserError(
                    f"expected {name} = {wanted} in {key} of {folder / 'config.json'}, as in the released CLIP, got "
                    f"{part[name]}: this model cannot be imported"
                )
        if "num_attention_heads" in part:
            settings[f"{tower}_heads"] = int(part["num_attention_heads"])
    pixels = _json(folder / "preprocessor_config.json")
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in pixels:
            settings[ours] = tuple(pixels[theirs])
    return settings


def _json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"expected json in {path}, got {format.first_line(error)}: mend or remove it") from error
    return found if isinstance(found, dict) else {}


def convert(state: Mapping[str, np.ndarray], **settings) -> tuple[clip.CLIPConfig, Params]:
    """A state dict in either naming -> config and parameters (numpy float32) of `models.clip`.

    settings: fields of CLIPConfig that arrays do not tell: image_heads, text_heads (default: heads of 64), mean, std.

    Raises:
      UserError: an array is missing, left over or of another shape than the rest asks for, or the sizes do not fit.
    """
    state = _named_as_hugging_face(state)
    try:
        config = _infer_config(state, settings)
        params = _params(state, config)
    except KeyError as error:
        raise UserError(f"expected the state dict of a CLIP with two transformers, but {error} is missing") from error
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"these arrays do not make a CLIP with two transformers: {error}") from error
    if state:
        raise UserError(f"expected the state dict of a CLIP alone, got {sorted(state)[0]} too: remove what is not its")
    model_dir.check_params(params, clip.model(config).abstract, where="the state dict")
    return config, params


def _named_as_hugging_face(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in state.items():
        if _IGNORED.fullmatch(name):
            continue
        for pattern, replacement in _OPENAI_NAMES:
            name = re.sub(pattern, replacement, name)
        array = np.asarray(array, np.float32)
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
    image_width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    text_ids, text_width = state["text_model.embeddings.token_embedding.weight"].shape
    grid = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    sizes = {
        "embed": len(state["visual_projection.weight"]),
        "image_size": grid * patch,
        "patch": patch,
        "image_layers": _count_layers(state, "vision_model"),
        "image_width": image_width,
        "image_heads": image_width // HEAD_SIZE,
        "text_len": len(state["text_model.embeddings.position_embedding.weight"]),
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
    """Takes every array that it uses out of `state`."""
    take = state.pop
    patch_DCHW = take("vision_model.embeddings.patch_embedding.weight")
    image = {
        "patch": patch_DCHW.transpose(2, 3, 1, 0).reshape(-1, config.image_width),
        "class_embedding": take("vision_model.embeddings.class_embedding")[None],
        "position": take("vision_model.embeddings.position_embedding.weight"),
        "norm_before_gain": take("vision_model.pre_layrnorm.weight"),
        "norm_before_bias": take("vision_model.pre_layrnorm.bias"),
        "blocks": _blocks(state, "vision_model", config.image_layers, config.image_heads),
        "norm_gain": take("vision_model.post_layernorm.weight"),
        "norm_bias": take("vision_model.post_layernorm.bias"),
        "projection": take("visual_projection.weight").T,
    }
    text = {
        "embedding": take("text_model.embeddings.token_embedding.weight"),
        "position": take("text_model.embeddings.position_embedding.weight"),
        "blocks": _blocks(state, "text_model", config.text_layers, config.text_heads),
        "norm_gain": take("text_model.final_layer_norm.weight"),
        "norm_bias": take("text_model.final_layer_norm.bias"),
        "projection": take("text_projection.weight").T,
    }
    return {"image": image, "text": text, "log_scale": take("logit_scale").reshape(1)}


def _blocks(state: dict[str, np.ndarray], tower: str, layers: int, heads: int) -> Params:
    """All layers of a tower, stacked; torch keeps matrices as [outputs, inputs]."""

    def one(index: int) -> Params:
        take = lambda name: state.pop(f"{tower}.encoder.layers.{index}.{name}")  # noqa: E731
        matrices = [take(f"self_attn.{part}_proj.weight").T for part in "qkv"]
        biases = [take(f"self_attn.{part}_proj.bias") for part in "qkv"]
        width = len(matrices[0])
        return {
            "norm1_gain": take("layer_norm1.weight"),
            "norm1_bias": take("layer_norm1.bias"),
            "qkv": np.stack(matrices, axis=1).reshape(width, 3, heads, -1),
            "qkv_bias": np.stack(biases).reshape(3, heads, -1),
            "out": take("self_attn.out_proj.weight").T.reshape(heads, -1, width),
            "out_bias": take("self_attn.out_proj.bias"),
            "norm2_gain": take("layer_norm2.weight"),
            "norm2_bias": take("layer_norm2.bias"),
            "up": take("mlp.fc1.weight").T,
            "up_bias": take("mlp.fc1.bias"),
            "down": take("mlp.fc2.weight").T,
            "down_bias": take("mlp.fc2.bias"),
        }

    every = [one(index) for index in range(layers)]
    return {name: np.stack([layer[name] for layer in every]) for name in every[0]}
