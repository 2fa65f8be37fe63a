"""One of two processes that train for `test_samples.py` and draw samples: FOLDER PORT N I MODEL [OVERRIDE ...]."""

import pathlib
import sys

import jax

from dalle_jax.cli.hooks import hooks_of
from dalle_jax.train.run import train
from dalle_jax.train.settings import load_settings
from tests.support import processes


def fails(step, state):
    if jax.process_index() == 0:
        raise MemoryError("the first process alone")


def main(folder: pathlib.Path, overrides) -> None:
    settings, workdir = load_settings("configs/transformer.py:demo", overrides), folder / "run"
    result = train(settings, workdir, hooks=[(1, fails), *hooks_of(settings, workdir)])
    cut = [
        leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(result.state["ema"]["blocks"])
    ]
    assert result.step == settings.run.steps and sum(cut) > len(cut) / 2


if __name__ == "__main__":
    place, _, overrides = processes.join(*sys.argv[1:])
    main(place, overrides)
