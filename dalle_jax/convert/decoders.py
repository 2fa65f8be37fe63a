"""minDALL-E and ru-DALL-E's Malevich as their authors store them: names and sizes in terms of `models.transformer`.

Sizes are inferred from the arrays. Which release a Malevich is of, its stored masks say. Linear layers are stored as
[outputs, inputs]; one of theirs may hold several of ours and the other way around.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import attention_pattern, model_dir
from dalle_jax.convert import weights
from dalle_jax.convert.stored import State
from dalle_jax.errors import UserError
from dalle_jax.models import Params
from dalle_jax.models.transformer import TransformerConfig, model

_MATRICES = ("qkv", "out", "up", "down", "text_head", "image_head")  # stored transposed


@dataclasses.dataclass(frozen=True)
class Names:
    """Ours -> theirs: of what lies outside the layers, and of layer i; several names are joined along their outputs.

    head_size: of attention, which no array shows. ignored: buffers, as a pattern.
    """

    ends: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    head_size: int
    ignored: str


def _norms(**names: str) -> dict[str, str]:
    return {f"{ours}_{a}": f"{n}.{b}" for ours, n in names.items() for a, b in (("gain", "weight"), ("bias", "bias"))}


def _linear(**names: str | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found = {}
    for ours, theirs in names.items():
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        found |= {ours: tuple(f"{n}.weight" for n in theirs), f"{ours}_bias": tuple(f"{n}.bias" for n in theirs)}
    return found


def _layer(place: str, norms: dict[str, str], linear: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    every = {ours: (name,) for ours, name in norms.items()} | linear
    return {ours: tuple(place + name for name in names) for ours, names in every.items()}


MINDALLE = Names(
    ends={
        "text_embedding": "tok_emb_txt.weight",
        "image_embedding": "tok_emb_img.weight",
        "text_position": "pos_emb_txt.weight",
        "image_position": "pos_emb_img.weight",
        "text_head": "head_txt.weight",
        "image_head": "head_img.weight",
    }
    | _norms(norm="ln_f"),
    layer=_layer(
        "blocks.{i}.",
        _norms(norm1="ln1", norm2="ln2"),
        _linear(qkv=("attn.query", "attn.key", "attn.value"), out="attn.proj", up="mlp.0", down="mlp.2"),
    ),
    head_size=64,
    ignored=r"blocks\.\d+\.attn\.mask",
)
MALEVICH = Names(
    ends={
        "text_embedding": "text_embeddings.weight",
        "image_embedding": "image_embeddings.weight",
        "text_position": "text_pos_embeddings.weight",
        "row_position": "image_row_embeddings.weight",
        "column_position": "image_col_embeddings.weight",
        "text_head": "to_logits.1.weight",
        "image_head": "to_logits.1.weight",
        "text_head_bias": "to_logits.1.bias",
        "image_head_bias": "to_logits.1.bias",
    }
    | _norms(norm="transformer.final_layernorm", head_norm="to_logits.0"),
    layer=_layer(
        "transformer.layers.{i}.",
        _norms(
            norm1="input_layernorm",
            after1="before_first_addition_layernorm",
            norm2="post_attention_layernorm",
            after2="before_second_addition_layernorm",
        ),
        _linear(
            qkv="attention.query_key_value", out="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"
        ),
    ),
    head_size=128,
    ignored=r"transformer\.(row|col|conv)_mask",
)


def convert_mindalle(state: State, *, text_pad: int, heads: int | None = None) -> tuple[TransformerConfig, Params]:
    """Config and parameters (numpy, in the type of the file) of minDALL-E's second stage.

    text_pad: the entry of its vocabulary that pads captions. heads: of attention; None for the published head size.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than the rest asks for.
    """
    rows = _rows(state, MINDALLE)
    sizes = {"text_len": rows["text_position"], "text_vocab": rows["text_embedding"], "text_pad": text_pad}
    grid = math.isqrt(rows["image_position"])
    config = _config(state, MINDALLE, rows, heads, family="mindalle", pattern="full", grid=grid, **sizes)
    return config, _params(state, MINDALLE, config)


def convert_malevich(
    state: State, *, release: str | None = None, heads: int | None = None
) -> tuple[TransformerConfig, Params]:
    """Config and parameters (numpy, in the type of the file) of a Malevich of ru-DALL-E.

    release: 'malevich-v2' or 'malevich' for those after it; None: as the file's masks are. heads: as there.

    Raises:
      UserError: as for `convert_mindalle`, or no release is given and no mask says it.
    """
    rows = _rows(state, MALEVICH)
    grid, text_len = rows["row_position"], rows["text_position"] - 1
    found = _release(state, text_len=text_len, grid=grid)
    if found and release not in (None, found):
        raise UserError(
            f"expected weights of the release {release}, got those of {found} by their masks: name no release"
        )
    if not (found or release):
        raise UserError("expected transformer.conv_mask, which says of which release a Malevich is, got none: name it")
    family = release or found
    sizes = {"text_len": text_len, "text_vocab": rows["text_embedding"] - text_len}
    config = _config(state, MALEVICH, rows, heads, family=family, pattern=family, grid=grid, **sizes)
    return config, _params(state, MALEVICH, config)


def _release(state: State, *, text_len: int, grid: int) -> str | None:
    """The release whose last layer sees what the stored mask says, by the image's part of it."""
    if "transformer.conv_mask" not in state:
        return None
    stored = np.asarray(state["transformer.conv_mask"])[-grid * grid :, -grid * grid :].astype(bool)
    for family in ("malevich", "malevich-v2"):
        if np.array_equal(stored, attention_pattern.allowed_image(attention_pattern.PATTERNS[family], grid=grid)):
            return family
    raise UserError("expected a mask of Malevich's releases v2 or v3 in transformer.conv_mask, got another")


def _rows(state: State, names: Names) -> dict[str, int]:
    """First dimensions of the arrays outside the layers, by our names."""
    if missing := sorted(set(names.ends.values()) - state.keys()):
        raise UserError(
            f"expected the arrays of a {'minDALL-E' if names is MINDALLE else 'Malevich'}, but {missing[0]} is missing"
        )
    return {ours: state[name].shape[0] for ours, name in names.ends.items()}


def _config(state: State, names: Names, rows: Mapping[str, int], heads: int | None, **given) -> TransformerConfig:
    pattern = re.escape(names.layer["norm1_gain"][0]).replace(r"\{i\}", r"(\d+)")
    layers = [int(match[1]) for match in (re.fullmatch(pattern, name) for name in state) if match]
    width, heads = rows["norm_gain"], heads or rows["norm_gain"] // names.head_size
    try:
        return TransformerConfig(
            num_layers=1 + max(layers, default=-1),
            width=width,
            heads=heads,
            head_size=width // heads,
            image_vocab=rows["image_embedding"],
            **given,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"expected the arrays of a text-to-image transformer, got sizes of none: {error}") from error


def _params(state: State, names: Names, config: TransformerConfig) -> Params:
    abstract = model(config).abstract
    blocks = {name: leaf.shape[1:] for name, leaf in abstract["blocks"].items()}
    kept = {name: array for name, array in state.items() if not re.fullmatch(names.ignored, name)}
    weights.check_names(kept, _stored_shapes(state, names, config, blocks), what=f"a whole {config.family}")
    params: Params = {name: _end(state, names, config, name) for name in abstract if name != "blocks"}
    params["blocks"] = {}
    for name, shape in blocks.items():
        layers = [_of_layer(names, name, i) for i in range(config.num_layers)]
        params["blocks"][name] = weights.stacked(kept, layers, shape, matrix=name in _MATRICES)
    model_dir.check_params(params, abstract, where="the weights")
    return params


def _stored_shapes(
    state: State, names: Names, config: TransformerConfig, blocks: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Every name in the file -> its shape there, by the sizes of the config and the rows that gave them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, theirs in names.ends.items():
        rows, vector = state[theirs].shape[0], name.endswith(("_gain", "_bias"))
        shapes[theirs] = (config.width,) if "norm" in name else (rows,) if vector else (rows, config.width)
    for name, shape in blocks.items():
        inputs = shape[0] if name == "down" else config.width if name in _MATRICES else None
        each = weights.joined_shape(shape, parts=len(names.layer[name]), inputs=inputs)
        shapes |= {theirs: each for i in range(config.num_layers) for theirs in _of_layer(names, name, i)}
    return shapes


def _end(state: State, names: Names, config: TransformerConfig, name: str) -> np.ndarray:
    """A parameter outside the layers: of what a file has more of, its part."""
    array, layout = weights.finite(names.ends[name], state[names.ends[name]]), config.layout
    if name == "text_position":
        array = array[: layout.text_slots]  # a Malevich stores one more than its later releases read
    elif names.ends["text_head"] == names.ends["image_head"] and "_head" in name:
        array = array[: layout.text_ids] if name.startswith("text") else array[layout.text_ids :]
    return array.T if name in _MATRICES else array


def _of_layer(names: Names, name: str, layer: int) -> list[str]:
    return [theirs.format(i=layer) for theirs in names.layer[name]]
