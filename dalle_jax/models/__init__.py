"""Model definitions, and the table of their names."""

from collections.abc import Callable, Mapping
from typing import Any

from dalle_jax.models import clip, dvae, inception, lpips, seq2seq, transformer
from dalle_jax.models.layers import Model, Params
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.model import model as vq_model

__all__ = ["Model", "Params", "build", "make_config"]

_MODELS: dict[str, tuple[type, Callable[[Any], Model]]] = {
    "dvae": (dvae.DVAEConfig, dvae.model),
    "vq": (VQConfig, vq_model),
    "transformer": (transformer.TransformerConfig, transformer.model),
    "seq2seq": (seq2seq.Seq2SeqConfig, seq2seq.model),
    "clip": (clip.CLIPConfig, clip.model),
    "inception": (inception.InceptionConfig, inception.model),
    "lpips": (lpips.LPIPSConfig, lpips.model),
}

# Options that version 0.1 wrote into `config.json` and that are gone; none of them changed what a model computes.
_GONE = {"transformer": ("loss_parts", "matmuls")}


def make_config(name: str, values: Mapping[str, Any]) -> Any:
    """The sizes of the model of this name as its dataclass.

    Raises:
      ValueError: unknown name or an impossible size. TypeError: an unknown size.
    """
    if name not in _MODELS:
        raise ValueError(f"model must be one of {tuple(_MODELS)}, got {name!r}")
    return _MODELS[name][0](**{key: value for key, value in values.items() if key not in _GONE.get(name, ())})


def build(name: str, config: Any) -> Model:
    """The model of this name as pure functions. config: its sizes, as `make_config` gives or takes them.

    Raises:
      ValueError: unknown name or an impossible size. TypeError: an unknown size.
    """
    if isinstance(config, Mapping):
        config = make_config(name, config)
    return _MODELS[name][1](config)
