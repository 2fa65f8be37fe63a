"""`dalle-jax export`: the parameters of a run, and nothing else, as a model directory that `sample` and others read."""

import argparse
import pathlib
import shutil

from dalle_jax import model_dir, text
from dalle_jax.errors import UserError

BESIDES = (*text.FILE_NAMES, "clip")  # what a model reads captions with, and ranks with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="DIR", help="a run, or a model directory")
    parser.add_argument("out", metavar="OUT", help="folder for config.json and params.safetensors")
    parser.add_argument("--raw", action="store_true", help="write the parameters (default: their moving average)")
    parser.add_argument("--step", type=int, help="the checkpoint of this update (default: the newest)")


def main(args: argparse.Namespace) -> int:
    source, out = pathlib.Path(args.workdir), pathlib.Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"expected a new or empty folder to export to, got {out}: choose another")
    print(f"{export(source, out, step=args.step, average=not args.raw)} in {out}")
    return 0


def export(source: pathlib.Path, out: pathlib.Path, *, step: int | None = None, average: bool = True) -> str:
    """Write OUT, and return the name of the model; step, average: see `model_dir.load`."""
    found = model_dir.load(source, step=step, average=average)
    exported = {key: found.config[key] for key in ("name", "model")}
    if dropout := found.config.get("data", {}).get("caption_dropout"):
        exported["data"] = {"caption_dropout": dropout}  # whether the model can be guided
    needed = [role for role in model_dir.ROLES if role not in model_dir.TRAINING_ROLES]
    frozen = {role: model_dir.load_frozen(source, role) for role in needed if model_dir.has_frozen(source, role)}
    model_dir.save(out, exported, found.params)
    if frozen:
        model_dir.save_frozen(out, frozen)
    for name in BESIDES:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)
        elif (source / name).exists():
            shutil.copy(source / name, out / name)
    return found.config["name"]
