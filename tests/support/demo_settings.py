"""Settings of the demos with other values of some keys."""

import os
from collections.abc import Mapping
from typing import Any

from dalle_jax.train.settings import TrainSettings, load_settings


def demo_settings(name: str, values: Mapping[str, Any], **run) -> TrainSettings:
    """configs/NAME.py:demo. values: config key -> value, a path among them too. run: of keys below `run`.

    The warm-up is no longer than the run.
    """
    demo = load_settings(f"configs/{name}.py:demo")
    changed = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in values.items()}
    changed |= {f"run.{key}": value for key, value in run.items()}
    warmup_steps = min(demo.optimizer.schedule.warmup_steps, changed.get("run.steps", demo.run.steps))
    return demo.changed({"optimizer.schedule.warmup_steps": warmup_steps} | changed)
