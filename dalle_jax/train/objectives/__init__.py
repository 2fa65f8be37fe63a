"""From a config to its `Task`: the only dispatch of training on a model's name, and the checks that its parts fit."""

import dataclasses

import ml_collections

from dalle_jax import model_dir
from dalle_jax.errors import UserError
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.train.objectives.clip import clip_task
from dalle_jax.train.objectives.dvae import dvae_task
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.objectives.transformer import transformer_task


def build_task(config: ml_collections.ConfigDict) -> Task:
    """The task of `config.name`. A transformer loads the dVAE in `config.dvae`, a workdir or an exported model.

    Raises:
      UserError: an unknown name, impossible sizes, a dVAE that is missing, damaged or of another grid, vocabulary or
        picture size than the config's, or a CLIP that accumulates.
    """
    try:
        if config.name == "dvae":
            _check_sizes("config.data.image_size", config.data.image_size, "config.model", DVAEConfig(**config.model))
            return dvae_task(config)
        if config.name == "transformer":
            return _transformer_task(config)
        if config.name == "clip":
            return _clip_task(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"expected a possible {config.name} in config.model, got one where {error}") from error
    raise UserError(f"config.name must be dvae, transformer or clip, got {config.name!r}")


def _transformer_task(config: ml_collections.ConfigDict) -> Task:
    if not config.dvae:
        raise UserError("a transformer needs a trained dVAE: give its folder as --config.dvae=DIR")
    dvae = model_dir.load(config.dvae, name="dvae")
    model = dvae.model
    _check_sizes("config.model.grid", config.model.grid, config.dvae, model.config, field="grid")
    _check_sizes("config.model.image_vocab", config.model.image_vocab, config.dvae, model.config, field="vocab")
    _check_sizes("config.data.image_size", config.data.image_size, config.dvae, model.config)
    return dataclasses.replace(transformer_task(config, model, dvae.params), frozen_sha256=dvae.digest)


def _clip_task(config: ml_collections.ConfigDict) -> Task:
    if config.accumulate != 1:
        raise UserError(
            f"expected config.accumulate = 1 for CLIP, got {config.accumulate}: its loss compares all pictures of a "
            "batch with all its captions, which microbatches cannot; to save memory, take config.model.remat or more "
            "devices"
        )
    _check_sizes("config.data.image_size", config.data.image_size, "config.model", CLIPConfig(**config.model))
    return clip_task(config)


def _check_sizes(
    key: str, value: int, where: str, model: DVAEConfig | CLIPConfig, *, field: str = "image_size"
) -> None:
    kind = "dVAE" if isinstance(model, DVAEConfig) else "CLIP"
    if value != getattr(model, field):
        raise UserError(
            f"expected {key} = {getattr(model, field)}, the {kind}'s {field} in {where}, got {value}: set one of them"
        )
