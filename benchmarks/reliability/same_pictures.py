"""Are pictures the same for any batch size, split and number of devices, as compiled for use?

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.reliability.same_pictures DIR

The tests ask it of tiny models, compiled without optimisations. Here a trained float32 model draws 16 pictures of each
of four captions in one call on one device; then one by one, in batches of 12, and on all devices, of which each has the
model, or two or four share one. Counts image tokens and values of pixels that differ.
"""

import os
import sys

import jax
import numpy as np

from benchmarks import harness
from dalle_jax import Pipeline
from dalle_jax.sample.request import Request

CAPTIONS = ("a red circle above a blue square", "a small star", "a yellow triangle", "a large blue circle")
EACH, BATCH = 16, 12
SETTINGS = ({}, {"guidance": 2.0}, {"options": {"temperature": 0.9, "top_k": 30, "top_p": 0.95}})


class Drawn:
    """A pipeline that gives what it draws as arrays."""

    def __init__(self, folder: str, **options):
        self.pipe = Pipeline.load(folder, **options)
        self.pipe.generator.can_guide = True  # whatever that looks like with a model that was not trained for it

    def __call__(self, requests, *, batch: int | None = None):
        """Image tokens [B, R, C] and pixels [B, H, W, 3], request by request."""
        if batch is not None:
            self.pipe._capacity = dict.fromkeys((False, True), (batch, f"{batch} images per batch"))
        pictures = [picture for row in self.pipe.draw(requests) for picture in row]
        self.pipe._capacity = {}
        return np.stack([picture.tokens for picture in pictures]), np.stack([np.asarray(p) for p in pictures])


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    args = parser.parse_args()
    devices = jax.devices()
    alone = Drawn(args.model, devices=devices[:1])
    config = alone.pipe.generator.model.config
    shared = [n for n in (1, 2, 4) if len(devices) % n == 0 and config.heads % n == 0]
    many = {n: Drawn(args.model, tensor=n) for n in shared}
    rows = []
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
            options = ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"
            rows.append((options, name, f"{wrong[0]} of {codes.size}", f"{wrong[1]} of {pixels.size}"))
            harness.log(" ".join(rows[-1]))
    flags = os.environ.get("XLA_FLAGS", "not set")
    lines = [
        harness.machine(f"{len(devices)} {devices[0].platform} devices", f"XLA_FLAGS {flags}"),
        f"Model of {config.num_layers} layers of {config.width} in {config.precision}; {EACH} pictures of each of "
        f"{len(CAPTIONS)} captions against those of one call on one device.",
        *harness.command(args),
        *harness.table("settings | drawn | image tokens that differ | values of pixels that differ", rows),
    ]
    harness.write(args.results / "same_pictures.md", "The same pictures", lines)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
