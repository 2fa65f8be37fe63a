"""How long a training loop stands still for a checkpoint, and how long the checkpoint takes in the background.

    python benchmarks/checkpoint.py --out DIR --gigabytes 20.8      # 1.3 billion parameters x 16 bytes

The state is synthetic: parameters, their average and two moments in float32, cut along fsdp over all devices, in
arrays like those of 24 layers of width 2048. "blocking" is the time until `save` returns; "next update" is what the
update after it, which overwrites the state in place, takes longer than one without a save: on a CPU device the copy
that an accelerator makes inside `save` is made there. The first save also makes Orbax's threads; the later ones count.
Needs about twice the bytes in host memory where the device is the CPU, and twice on the disk.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
from etils import epath

from dalle_jax import digest, sharding
from dalle_jax.checkpointer import Checkpoints

COPIES = ("params", "ema", "mu", "nu")
LAYERS, WIDTH = 24, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--gigabytes", type=float, default=20.8, help="of the state on this host, 1e9 bytes")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    mesh = sharding.make_mesh({"fsdp": -1})
    matrices = max(1, round(args.gigabytes * 1e9 / len(COPIES) / (LAYERS * WIDTH * WIDTH * 4)))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))

    def make(key):
        keys = jax.random.split(key, len(COPIES) * matrices)
        arrays = [jax.random.normal(k, (LAYERS, WIDTH, WIDTH), jnp.float32) for k in keys]
        return {copy: {str(i): arrays[c * matrices + i] for i in range(matrices)} for c, copy in enumerate(COPIES)}

    build = jax.jit(make, out_shardings={copy: {str(i): place for i in range(matrices)} for copy in COPIES})
    state = jax.block_until_ready(build(jax.random.key(0)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{size / 1e9:.2f} GB on {len(jax.devices())} {jax.devices()[0].device_kind}", flush=True)

    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.000001, s), donate_argnums=0)
    state = jax.block_until_ready(overwrite(state))  # compiled
    began = time.monotonic()
    state = jax.block_until_ready(overwrite(state))
    alone = time.monotonic() - began
    checkpoints = Checkpoints(args.out, keep=1)
    for number in range(1, args.saves + 1):
        began = time.monotonic()
        checkpoints.save(number, state, {})
        blocking = time.monotonic() - began
        state = jax.block_until_ready(overwrite(state))
        more = time.monotonic() - began - blocking - alone
        checkpoints.latest()  # waits
        total = time.monotonic() - began
        print(
            f"save {number}: blocking {blocking:.2f} s, next update {more:+.2f} s (alone {alone:.2f} s), complete "
            f"after {total:.2f} s ({size / 1e9 / total:.2f} GB/s)",
            flush=True,
        )

    folder = args.out / "checkpoints" / str(args.saves)
    began = time.monotonic()
    problem = digest.damage(epath.Path(folder))
    print(f"checking all files: {time.monotonic() - began:.2f} s, damage: {problem}")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    del state
    began = time.monotonic()
    _, restored, _ = checkpoints.restore_latest(abstract)
    jax.block_until_ready(restored)
    print(f"restoring, files checked: {time.monotonic() - began:.2f} s")
    checkpoints.close()


if __name__ == "__main__":
    main()
