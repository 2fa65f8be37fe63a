"""`dalle-jax evaluate`: how far pictures are from a reference set, and a report from which others can repeat it."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax

from dalle_jax import config, distributed, errors
from dalle_jax.data.share import Share
from dalle_jax.data.sources import HELP
from dalle_jax.errors import UserError, say
from dalle_jax.evaluate import report
from dalle_jax.evaluate.preprocess import CROPS, RESIZES
from dalle_jax.evaluate.protocol import PLACES, PROCESSES, Evaluation, Metrics
from dalle_jax.evaluate.run import evaluate
from dalle_jax.evaluate.workers import Worker
from dalle_jax.train.settings import Processes

EXIT_FAILED = 1
# Flags that a config has keys for: flag -> key.
FLAGS = {
    "reference": "reference", "weights": "weights", "clip": "clip", "resize": "measure.resize", "crop": "measure.crop",
    "reference_crop": "measure.reference_crop", "side": "measure.side", "blur": "measure.blur", "count": "count",
    "splits": "measure.splits", "seed": "measure.seed",
}  # fmt: skip
OTHER_KEYS = ("name", "processes")  # of a config, beside those of an `Evaluation`
FREE_KEYS = (*PLACES, "draw.shard_size", "overlap.least")  # values that a protocol leaves to the user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="DIR", help="workdir of the transformer that draws, with --config")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a whole protocol, e.g. configs/evaluate.py:coco, or the report.json of an evaluation to repeat (default: "
        "the options below)",
    )
    parser.add_argument("--from", dest="from_", metavar="REPORT", help=argparse.SUPPRESS)  # of version 0.1
    parser.add_argument(
        "--pictures", metavar="SOURCE", help=f"judge these (default: what DIR draws): a folder, or {HELP}"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("evaluation"),
        metavar="DIR",
        help="where the report and drawn pictures are written (default: evaluation)",
    )
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="write the reference's statistics (default: no)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: as text)")
    alone = parser.add_argument_group("without a config")
    alone.add_argument(
        "--reference", metavar="SOURCE", help="as --pictures, or a .npz of statistics, pytorch-fid's too (no default)"
    )
    alone.add_argument(
        "--weights",
        metavar="PATH",
        help="Inception v3: what `dalle-jax convert inception` wrote, or a published file (no default)",
    )
    alone.add_argument(
        "--clip",
        metavar="DIR",
        help="a CLIP, for CLIP score and R-precision of pictures with captions (default: none)",
    )
    default = Metrics()
    alone.add_argument(
        "--resize", choices=RESIZES, help=f"how pictures get the size of the network (default: {default.resize})"
    )
    alone.add_argument("--crop", choices=CROPS, help=f"of the pictures (default: {default.crop})")
    alone.add_argument("--reference-crop", choices=CROPS, help="of the reference (default: as --crop)")
    alone.add_argument(
        "--side",
        type=int,
        metavar="S",
        help="bring cropped pictures to S pixels before the blur (default: as they are)",
    )
    alone.add_argument(
        "--blur", type=float, nargs="+", metavar="R", help="radii of Gaussian blur of both sets, in pixels (default: 0)"
    )
    alone.add_argument(
        "--count", type=int, metavar="N", help="N pictures of each source, chosen by the seed (default: all)"
    )
    alone.add_argument("--splits", type=int, help=f"of the Inception score (default: {default.splits})")
    alone.add_argument("--seed", type=int, help=f"of choices, splits and subsets (default: {default.seed})")
    distributed.add_arguments(parser)
    parser.epilog = "--config.key=value changes a value of the config, e.g. --config.source=coco:DIR"


def main(args: argparse.Namespace) -> int:
    """Writes OUT/report.json, report.md and blur.png and says the scores; 1 for a repetition with another FID, else 0.

    Raises:
      UserError: a source, weights or statistics that cannot be used, too few pictures, or options that exclude each
        other.
    """
    evaluation, limits = _read_options(args)
    where = {"coordinator": args.coordinator, "num_processes": args.num_processes, "process_id": args.process_id}
    distributed.initialize(**where, start_seconds=limits.start_seconds, hang_seconds=limits.hang_seconds)
    with distributed.Watchdog(
        limits.hang_seconds, first_seconds=limits.compile_seconds, start_seconds=limits.start_seconds
    ) as watchdog:

        def meet():
            return distributed.gather_json(None)

        def beat(phase: str):
            watchdog.beat(0, phase)

        meet()  # the first collective connects all
        worker = Worker(Share(jax.process_index(), jax.process_count()), beat=beat, meet=meet, show=not args.json)
        made = evaluate(evaluation, model=args.model, out=args.out, worker=worker, save_statistics=args.save_statistics)
    if made is None:
        return 0
    for note in made["notes"]:
        errors.say(f"dalle-jax: note: {note}")
    print(json.dumps(made) if args.json else report.sentence(made, args.out / report.REPORT))
    if "repeats" not in made:
        return 0
    sentence, same = report.repetition(made)
    say(sentence)
    return 0 if same else EXIT_FAILED


def _read_options(args: argparse.Namespace) -> tuple[Evaluation, Processes]:
    """The evaluation, by a protocol, by a report or by flags, and the time limits of its processes."""
    if args.from_:
        raise UserError(f"--from is now --config: write --config {args.from_}")
    if not args.config:
        return _from_flags(args), PROCESSES
    for name, key in FLAGS.items():
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"expected --config.{key}=... instead of --{flag}, as the config has it: write that")
    if args.config.endswith(".json"):
        return _from_report(args), PROCESSES
    return _from_protocol(args)


def _from_protocol(args: argparse.Namespace) -> tuple[Evaluation, Processes]:
    if args.pictures and args.model:
        raise UserError("expected DIR, whose pictures are drawn, or --pictures, got both: leave one out")
    original, found = (config.load(args.config, words).to_dict() for words in ([], args.overrides))
    if found["name"] != "evaluate":
        raise UserError(f"expected a protocol such as configs/evaluate.py:coco, got {args.config}: give one")
    original, values = (_evaluation_values(values, args.pictures) for values in (original, found))
    changed = config.differences(original, values)
    values["departures"] = [
        f"{key} {b!r} instead of {a!r}" for key, (a, b) in sorted(changed.items()) if key not in FREE_KEYS
    ]
    return Evaluation.from_json(values, where=args.config), Processes(**found["processes"])


def _evaluation_values(found: dict[str, Any], pictures: str | None) -> dict[str, Any]:
    """A config's values of an `Evaluation`; of given pictures a protocol takes as many as it would draw."""
    values = {key: value for key, value in found.items() if key not in OTHER_KEYS}
    if pictures:
        values |= {"pictures": pictures, "count": values["count"] or values["draw"]["count"], "draw": None}
    return values


def _from_report(args: argparse.Namespace) -> Evaluation:
    """The evaluation of a report, with new places for what lies elsewhere now."""
    path = pathlib.Path(args.config)
    if args.pictures:
        raise UserError(f"expected --config.pictures=SOURCE to repeat {path}, got --pictures: write that")
    if args.out.resolve() == path.resolve().parent:
        raise UserError(f"expected another --out than {args.out}, where the report lies: parts of it would be reused")
    evaluation = report.load(path)
    for word in args.overrides:
        name, _, value = word.removeprefix(config.OVERRIDE).partition("=")
        part, _, key = name.rpartition(".")
        holder = getattr(evaluation, part, None) if part else evaluation
        if name not in PLACES or holder is None:
            raise UserError(
                f"expected only new places ({', '.join(PLACES)}) of what {path} used, got {word!r}: a report repeats "
                "the rest"
            )
        holder = dataclasses.replace(holder, **{key: value})
        changed: dict[str, Any] = {part: holder}
        evaluation = dataclasses.replace(evaluation, **changed) if part else holder
    return evaluation


def _from_flags(args: argparse.Namespace) -> Evaluation:
    if args.model or args.overrides:
        word = args.model or args.overrides[0]
        raise UserError(f"expected --config FILE.py:PROTOCOL with {word}, got none: e.g. configs/evaluate.py:coco")
    for name in ("pictures", "reference", "weights"):
        if getattr(args, name) is None:
            raise UserError(
                f"expected --pictures, --reference and --weights, or DIR and --config, got no --{name}: add it"
            )
    values = {key: getattr(args, flag) for flag, key in FLAGS.items() if getattr(args, flag) is not None}
    measure = {key.removeprefix("measure."): values.pop(key) for key in list(values) if key.startswith("measure.")}
    values |= {"pictures": args.pictures, "reference_count": args.count, "measure": measure}
    return Evaluation.from_json(values, where="the command line")
