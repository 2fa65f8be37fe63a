"""`dalle-jax inspect`: where a run stands. Reads only, so it may look at a run that is training.

The digests depend on the numbers alone, not on the mesh, the number of processes or the layout of the files: two runs
with the same digest are the same run.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
from typing import Any

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest, reader
from dalle_jax.train.monitor import goodput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="DIR", help="a run, or a model directory")
    parser.add_argument("--step", type=int, help="the checkpoint of this update (default: the newest undamaged one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: lines of text)")


def inspect(workdir: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """The report on a run or a model directory, as `--json` prints it.

    step, data: of the checkpoint that is looked at, by default the one from which the run would go on, the newest
    undamaged one; None for a model directory. parameters_sha256, average_sha256 (the
    moving average), state_sha256 (the whole training state). checkpoints: step, bytes, when it was written (UTC) and
    damage, which is None where the files are what was written. goodput: share, starts and seconds by kind.

    Raises:
      UserError: no run or model there, or the checkpoint cannot be read.
    """
    config = model_dir.read_config(workdir)
    if (workdir / model_dir.PARAMS).exists():
        parameters = digest.of_tree(model_dir.read_params(workdir, step=step))
        return {"step": None, "data": None, "parameters_sha256": parameters, "checkpoints": [], "config": config}
    newest, path = reader.checkpoint_path(workdir, model_dir.checkpoint_dir(config), step=step)
    checkpoints = _described(path.parent)
    if step is None:
        step = max((entry["step"] for entry in checkpoints if entry["damage"] is None), default=newest)
        path = path.parent / str(step)
    digests, ledger = reader.state_digests(path), goodput.read(workdir)
    return {
        "step": step,
        "data": reader.data_position(path),
        "parameters_sha256": digests["params"],
        "average_sha256": digests["ema"],
        "state_sha256": digests["state"],
        "checkpoints": checkpoints,
        "goodput": ledger and {key: ledger[key] for key in ("goodput", "starts", "seconds")},
        "config": config,
    }


def _described(folder) -> list[dict[str, Any]]:
    """`reader.describe` of each. A run that trains may delete old ones while their files are read, which is no
    damage."""
    found = []
    for step in reader.steps_in(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append(reader.describe(folder / str(step)))
    return [entry for entry in found if reader.is_complete(folder / str(entry["step"]))]


def main(args: argparse.Namespace) -> int:
    found = inspect(pathlib.Path(args.workdir), args.step)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['config']['name']} in {args.workdir}")
    if found["step"] is not None:
        run = found["config"].get("run", found["config"])  # version 0.1 has its keys at the top
        print(f"update       {found['step']} of {run['steps']}")
        print(f"data         {json.dumps(found['data'])}")
    for name in ("parameters", "average", "state"):
        if f"{name}_sha256" in found:
            print(f"{name:12} sha256 {found[f'{name}_sha256']}")
    for entry in found["checkpoints"]:
        written = datetime.datetime.fromisoformat(entry["written"]).strftime("%Y-%m-%d %H:%M:%S")
        damage = f", DAMAGED: {entry['damage']}" if entry["damage"] else ""
        print(f"checkpoint   {entry['step']:>8}  {entry['bytes'] / 1e6:12.1f} MB  {written} UTC{damage}")
    if found.get("goodput"):
        seconds = ", ".join(f"{kind} {spent:.0f} s" for kind, spent in found["goodput"]["seconds"].items())
        print(f"goodput      {found['goodput']['goodput']:.1%} over {found['goodput']['starts']} starts ({seconds})")
    for key in ("model", "optimizer", "data", "storage", "compression", "run"):
        if key in found["config"]:
            print(f"{key:12} {json.dumps(found['config'][key])}")
    return 0
