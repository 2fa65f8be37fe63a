"""One process of those in tests/evaluate/test_protocols.py: FOLDER PORT N I WORD ..., with small batches and parts."""

import sys
import time

from dalle_jax.cli import main as cli
from dalle_jax.evaluate import drawing, feature_cache, features
from dalle_jax.sample.pipeline import Pipeline

PART, TOGETHER, BATCH = 5, 3, 1  # as the tests have them


def main(port: str, count: str, rank: str, *words: str) -> int:
    packed = drawing.packed

    def slowly(*args):
        time.sleep(0.2)  # for whoever wants to kill this
        return packed(*args)

    drawing.packed = slowly
    feature_cache.PART, features.BATCH = PART, BATCH
    Pipeline.captions_per_batch = lambda pipe, request: TOGETHER
    where = ["--coordinator", f"localhost:{port}", "--num-processes", count, "--process-id", rank]
    return cli.main(["evaluate", *words, *where])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[2:]))
