"""How long a training loop stands still for a checkpoint, and how long the checkpoint takes in the background.

    python -m benchmarks.reliability.checkpoint --out DIR --gigabytes 20.8      # 1.3 billion parameters x 16 bytes

The state is synthetic: parameters, their average and two moments in float32, cut along fsdp over all devices, in
arrays like those of 24 layers of width 2048. "save" is the time until `save` returns, "next update" what the update
after it, which overwrites the state in place, takes longer than one without a save; the loop stands still for both.
The first save also makes Orbax's threads and, on a CPU device, takes memory for the copy; the later ones count. Needs
twice the bytes in host memory, three times where the device is the CPU, and twice on the disk.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from etils import epath

from benchmarks import harness
from dalle_jax.checkpoint import digest
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.mesh import make_mesh

FULL, LIMIT = 20.8, 2.0  # gigabytes of 1.3 billion parameters on one host; seconds that the loop may stand still
COPIES = ("params", "ema", "mu", "nu")
LAYERS, WIDTH = 24, 2048


def main() -> None:
    parser = harness.parser(__doc__, out="a new folder")
    parser.add_argument("--gigabytes", type=float, default=FULL, help="of the state on this host, 1e9 bytes")
    parser.add_argument("--saves", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    mesh = make_mesh({"fsdp": -1})
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
    device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    machine, saves = harness.machine(device), []
    checkpoints = Checkpoints(args.out, keep=1)
    for number in range(1, args.saves + 1):
        began, cpu = time.monotonic(), time.process_time()
        checkpoints.save(number, state, {})
        blocking, cpu = time.monotonic() - began, time.process_time() - cpu
        state = jax.block_until_ready(overwrite(state))
        more = time.monotonic() - began - blocking - alone
        checkpoints.latest()  # waits
        total = time.monotonic() - began
        found = {"save": blocking, "save_cpu": cpu, "next_update": more, "complete": total}
        saves.append({name: round(seconds, 3) for name, seconds in found.items()})
        print(f"save {number}: {saves[-1]}, an update alone {alone:.2f} s", flush=True)

    folder = args.out / "checkpoints" / str(args.saves)
    began = time.monotonic()
    problem = digest.damage(epath.Path(folder))
    checked = time.monotonic() - began
    if problem:
        raise SystemExit(f"the checkpoint is damaged: {problem}")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    del state
    began = time.monotonic()
    _, restored, _ = checkpoints.restore_latest(abstract)
    jax.block_until_ready(restored)
    restored_in = time.monotonic() - began
    checkpoints.close()
    later = saves[1:] or saves
    middle = {name: statistics.median(save[name] for save in later) for name in later[0]}
    stands = statistics.median(save["save"] + max(save["next_update"], 0) for save in later)
    gigabytes = size / 1e9
    rows = [(number, save) for number, save in enumerate(saves, 1)] + [("middle of the later", middle)]
    lines = [
        machine,
        *harness.command(args),
        f"{gigabytes:.2f} GB on this host; an update in place alone takes {alone:.2f} s.",
        "",
        *harness.table(
            "save | until `save` returns, s | CPU seconds in it | next update takes longer by, s | complete after, s",
            [
                (name, f"{s['save']:.2f}", f"{s['save_cpu']:.2f}", f"{s['next_update']:+.2f}", f"{s['complete']:.1f}")
                for name, s in rows
            ],
        ),
        "",
        f"Checking all files takes {checked:.1f} s, checking and restoring {restored_in:.1f} s.",
        "",
        f"The loop stands still for {stands:.2f} s, {stands / gigabytes:.2f} s/GB (CPU time of the copy: "
        f"{middle['save_cpu'] / gigabytes:.2f} s/GB); in proportion {stands / gigabytes * FULL:.1f} s at {FULL} GB, of "
        f"which the copy has {middle['save_cpu'] / gigabytes * FULL:.1f} s of CPU time. Under {LIMIT:g} s takes "
        f"{FULL / LIMIT:.1f} GB/s from device to host memory, all devices of the host together.",
    ]
    harness.write(args.results / "checkpoint.md", "Checkpoints: how long the loop stands still", lines)


if __name__ == "__main__":
    main()
