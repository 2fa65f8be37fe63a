"""Are pictures the same for any batch size, split and number of devices, as compiled for use?

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.reliability.same_pictures DIR

The tests ask it of tiny models, compiled without optimisations. Here a trained float32 model draws 16 pictures of each
of four captions in one call on one device; then one by one, in batches of 12, and on all devices, of which each has the
model, or two or four share one. Counts codes and values of pixels that differ.

Writes the table to `benchmarks/results/same_pictures.md`.
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

import jax
import numpy as np

from dalle_jax import Pipeline
from dalle_jax.sample.request import Request

RESULT = Path(__file__).resolve().parent.parent / "results" / "same_pictures.md"
CAPTIONS = ("a red circle above a blue square", "a small star", "a yellow triangle", "a large blue circle")
EACH, BATCH = 16, 12
SETTINGS = ({}, {"guidance": 2.0}, {"options": {"temperature": 0.9, "top_k": 30, "top_p": 0.95}})


class Drawn:
    """A pipeline that remembers the image tokens of its pictures."""

    def __init__(self, folder: str, **options):
        self.pipe, self._seen = Pipeline.load(folder, **options), []
        generator = self.pipe.generator
        generator.can_guide = True  # whatever that looks like with a model that was not trained for it
        self._decode, generator.decode = generator.decode, self._note

    def _note(self, tokens):
        self._seen.append(np.array(tokens))
        return self._decode(tokens)

    def __call__(self, requests, *, batch: int | None = None):
        """Image tokens [B, I] and pixels [B, H, W, 3], request by request."""
        self._seen.clear()
        if batch is not None:
            self.pipe._capacity = dict.fromkeys((False, True), (batch, f"{batch} images per batch"))
        pictures = [np.asarray(picture) for row in self.pipe.draw(requests) for picture in row]
        self.pipe._capacity = {}
        return np.concatenate(self._seen), np.stack(pictures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    devices = jax.devices()
    alone = Drawn(args.model, devices=devices[:1])
    config = alone.pipe.generator.model.config
    shared = [n for n in (1, 2, 4) if len(devices) % n == 0 and config.heads % n == 0]
    many = {n: Drawn(args.model, tensor=n) for n in shared}
    lines = [
        "# The same pictures",
        "",
        f"{datetime.date.today().isoformat()}; {len(devices)} {devices[0].platform} devices, XLA_FLAGS "
        f"{os.environ.get('XLA_FLAGS', 'not set')}; jax {jax.__version__}, python {platform.python_version()}. Model "
        f"of {config.num_layers} layers of {config.width} in {config.precision}; {EACH} pictures of each of "
        f"{len(CAPTIONS)} captions against those of one call on one device.",
        "",
        "    python -m benchmarks.reliability.same_pictures DIR",
        "",
        "| settings | drawn | codes that differ | values of pixels that differ |",
        "|---|---|---|---|",
    ]
    differ = 0
    for settings in SETTINGS:
        asked = [Request(caption, n=EACH, seed=100 * i, **settings) for i, caption in enumerate(CAPTIONS)]
        each = [Request(r.caption, seed=r.seed + m, **settings) for r in asked for m in range(EACH)]
        codes, pixels = alone(asked)
        ways = {
            "one by one": [alone([request]) for request in each],
            f"in batches of {BATCH}": [alone(asked, batch=BATCH)],
        }
        for number, drawn in many.items():
            ways[f"on {len(devices)} devices, {number} a model"] = [drawn(asked)]
        for name, parts in ways.items():
            other_codes, other_pixels = (np.concatenate(part) for part in zip(*parts, strict=True))
            wrong = int((other_codes != codes).sum()), int((other_pixels != pixels).sum())
            differ += sum(wrong)
            told = ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"
            lines.append(f"| {told} | {name} | {wrong[0]} of {codes.size} | {wrong[1]} of {pixels.size} |")
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
