"""One process of those in tests/evaluate/test_protocols.py: FOLDER PORT N I WORD ..., with small batches and parts."""

import sys
import time

from dalle_jax.cli import main as cli
from dalle_jax.evaluate import drawing, feature_cache, features, image_shards

PART, TOGETHER, BATCH = 5, 3, 1  # as the tests have them


def main(port: str, count: str, rank: str, *words: str) -> int:
    sync = image_shards.GrowingShard.sync

    def slowly(self):
        sync(self)
        time.sleep(0.5)  # for whoever wants to kill this

    image_shards.GrowingShard.sync = slowly
    feature_cache.PART, features.BATCH = PART, BATCH
    drawing.captions_per_call = lambda drawing: TOGETHER
    where = ["--coordinator", f"localhost:{port}", "--num-processes", count, "--process-id", rank]
    return cli.main(["evaluate", *words, *where])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[2:]))
