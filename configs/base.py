"""From dataclasses to the keys of a config, and what several configs share.

The keys of a training config, their defaults and what they mean stand in `dalle_jax/train/settings.py`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# For runs of days on many machines, unattended at night. Before each checkpoint (every 1,000 steps) devices that must
# agree are compared, so no checkpoint holds what a faulty chip made of the model; a check reads the state once, less
# than a step does. One checkpoint in 12 hours is kept for good, to return to when a fault is noticed late: of 12b, 197
# GB each, four in the two days that preflight gives for 1024 chips, and 29 in the two weeks of 64.
WATCHED = dict(check_replicas_every=1_000, keep_every_hours=12.0)

# The paper's filters (appendix C), the same for the dVAE as for the transformer. It gives no length: that captions of
# one word are too short is our choice. A dVAE keeps images without a caption.
PAPER_FILTERS = dict(min_caption_words=2, english_only=True, drop_boilerplate=True, max_aspect_ratio=2.0)


def fields(instance: Any) -> ConfigDict:
    """The fields of a dataclass instance as config keys, those of its parts nested; a part that is None is left out.

    Any other None becomes a placeholder, which takes a value of the field's type.
    """
    config, hints = ConfigDict(), typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, kinds = getattr(instance, field.name), typing.get_args(hints[field.name])
        if dataclasses.is_dataclass(value):
            config[field.name] = fields(value)
        elif isinstance(value, Mapping):  # `frozen`: role -> folder
            config[field.name] = ConfigDict({key: placeholder(str) for key in value})
        elif value is not None:
            config[field.name] = value
        elif not dataclasses.is_dataclass(kinds[0]):
            config[field.name] = placeholder(kinds[0])
    return config
