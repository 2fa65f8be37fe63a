"""From settings to a `Task`: the only table of what can be trained.

Each module has `build(settings, frozen) -> Task`, and FROZEN, the roles of the models that it uses and leaves as they
are. Those in its OPTIONAL, if it has any, may be missing.
"""

from collections.abc import Mapping

from dalle_jax.errors import check_choice
from dalle_jax.model_dir import ModelDir
from dalle_jax.train.objectives import clip, dvae, transformer, vq
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.settings import TrainSettings

OBJECTIVES = {"dvae": dvae, "vq": vq, "transformer": transformer, "clip": clip}


def frozen_roles(settings: TrainSettings) -> tuple[str, ...]:
    """Roles of the models that the objective of these settings uses and leaves as they are.

    Raises:
      UserError: an unknown name.
    """
    check_choice("config.name", settings.name, OBJECTIVES)
    return OBJECTIVES[settings.name].FROZEN


def optional_roles(settings: TrainSettings) -> tuple[str, ...]:
    """Those of `frozen_roles` that may be missing."""
    return getattr(OBJECTIVES[settings.name], "OPTIONAL", ())


def build_task(settings: TrainSettings, frozen: Mapping[str, ModelDir]) -> Task:
    """The task of these settings. frozen: role -> model, of `frozen_roles`; their parameters may be abstract.

    Raises:
      UserError: models that do not fit each other.
    """
    return OBJECTIVES[settings.name].build(settings, frozen)
