"""Model definitions. `build` is the only place that dispatches on a model's name."""

from collections.abc import Mapping

from dalle_jax.models import clip, dvae, inception, transformer
from dalle_jax.models.layers import Model, Params

__all__ = ["Model", "Params", "build"]

_MODELS = {
    "dvae": (dvae.DVAEConfig, dvae.model),
    "transformer": (transformer.TransformerConfig, transformer.model),
    "clip": (clip.CLIPConfig, clip.model),
    "inception": (inception.InceptionConfig, inception.model),
}

# Options that version 0.1 wrote into `config.json` and that are gone; none of them changed what a model computes.
_GONE = {"transformer": ("loss_parts", "matmuls")}


def build(name: str, config: Mapping) -> Model:
    """The model of this name with these sizes, as pure functions.

    Raises:
      ValueError: unknown name or an impossible size. TypeError: an unknown size.
    """
    if name not in _MODELS:
        raise ValueError(f"model must be one of {tuple(_MODELS)}, got {name!r}")
    config_class, make = _MODELS[name]
    return make(config_class(**{key: value for key, value in config.items() if key not in _GONE.get(name, ())}))
