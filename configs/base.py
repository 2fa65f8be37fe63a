"""What every training config has. A variant starts from `base(...)` and sets what differs.

Defaults of a model, an objective or the data are those of its dataclass and are written there; the functions here
only lay them out as config keys.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.step import Storage


def fields(instance: Any) -> ConfigDict:
    """The fields of a dataclass instance as config keys; one that is None takes a value of its type."""
    config, types = ConfigDict(), typing.get_type_hints(type(instance))
    for name in types:
        value = getattr(instance, name)
        if dataclasses.is_dataclass(value):
            value = fields(value)
        config[name] = placeholder(typing.get_args(types[name])[0]) if value is None else value
    return config


def base(name: str, *, model: Any, data: Any) -> ConfigDict:
    """Every common key. name: 'dvae', 'transformer' or 'clip'; model, data: dataclass instances."""
    config = ConfigDict(
        {
            "name": name,
            "seed": 0,
            "steps": 0,  # updates
            "batch_size": 0,  # examples per update, all processes together
            "accumulate": 1,  # microbatches per update
            # -1 is chosen: fsdp as much of an island of fast links as the model divides into, replica the rest.
            "mesh": {"replica": -1, "fsdp": -1, "tensor": 1},
            # Each of these is explained in its dataclass, in dalle_jax/train.
            "storage": fields(Storage()),
            "compression": fields(Compression()),
            "optimizer": fields(Optimizer()),
            "ema": fields(Ema()),
            # How long processes wait for one another at the start, and how long one may be silent or stuck before the
            # job ends, where programs are compiled and elsewhere (distributed/watchdog.py).
            "processes": {"start_seconds": 300, "hang_seconds": 300, "compile_seconds": 3_600},
            # What products compute in and what keeps gradients in range: 'fp32', 'bf16', 'fp16-global', 'fp16-paper'
            # (docs/numerics.md). `model.precision` is the same value by another name, as a model alone needs it too.
            "precision": model.precision,
            "model": fields(model),
            # Named sources, e.g. wds:PATTERN or folder:DIR, of a transformer tokens:DIR; `validation` may be empty.
            # `lanes` is the most processes that may ever read them, 0 those of the first start (data/shards.py).
            "data": {"train": "", "validation": "", "lanes": 0, **fields(data)},
            # In updates; 0 is never. Training ends with a checkpoint in any case.
            "log_every": 50,
            "validate_every": 1_000,
            "validation_batches": 16,
            "picture_every": 1_000,
            "checkpoint_every": 1_000,
            "keep_checkpoints": 2,  # the newest
            "keep_every_hours": 0.0,  # and one in so many hours for ever; 0: none
            "checkpoint_dir": "",  # e.g. gs://bucket/run; '': below the workdir
            "rollback_after": 20,  # skipped updates in a row, then back to the last checkpoint; 0: never
            "check_replicas_every": 0,  # and before each checkpoint: do devices that must agree hold the same bits?
        }
    )
    config.model.precision = config.get_ref("precision")
    return config


def watch(config: ConfigDict) -> None:
    """For runs of days on many machines, which nobody looks at by night.

    Before each checkpoint (every 1,000 updates) devices that must agree are compared, so no checkpoint holds what a
    faulty chip made of the model; a check reads the state once, which is less than an update does. One checkpoint in
    12 hours stays for ever, to go back behind what is noticed late: of 12b, 197 GB each, four in the two days that
    preflight says 1024 chips take, and 29 in the fortnight of 64.
    """
    config.update(check_replicas_every=config.checkpoint_every, keep_every_hours=12.0)
