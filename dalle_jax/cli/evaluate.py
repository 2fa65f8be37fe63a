"""`dalle-jax evaluate`: how far pictures are from a reference set, and a report from which others can repeat it.

With `--reconstructions` it says how much of a picture image tokenizers keep.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dalle_jax import config, distributed, errors
from dalle_jax.data.share import Share
from dalle_jax.data.sources import HELP
from dalle_jax.errors import UserError, say
from dalle_jax.evaluate import reconstruction_report, report
from dalle_jax.evaluate.protocol import PLACES, PROCESSES, Evaluation
from dalle_jax.evaluate.reconstructions import Reconstructions, reconstruct
from dalle_jax.evaluate.run import evaluate
from dalle_jax.evaluate.workers import Worker
from dalle_jax.train.settings import Processes

EXIT_FAILED = 1
COCO, SETS = "configs/evaluate.py:coco", "configs/evaluate.py:sets"
RECONSTRUCTIONS = "configs/evaluate.py:reconstructions"
SHORT = ("reference", "weights", "clip")  # flags that stand for keys of the config
SHORT_OF_RECONSTRUCTIONS = ("data", "weights", "lpips")
RENAMED = {"from": "--config", "count": "--config.count and --config.reference_count"}  # flags of version 0.1
RENAMED |= {
    name: f"--config.measure.{name.replace('-', '_')}"
    for name in ("resize", "crop", "reference-crop", "side", "blur", "splits", "seed")
}
OTHER_KEYS = ("name", "processes")  # of a config, beside those of an `Evaluation`
FREE_KEYS = (*PLACES, "draw.shard_size", "overlap.min_cosine")  # values that a protocol leaves to the user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="DIR", help="workdir of the transformer that draws, with --config")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"a whole protocol, e.g. {COCO}, or the report.json of an evaluation to repeat (default: "
        f"{SETS}, two sets of pictures)",
    )
    parser.add_argument(
        "--pictures", metavar="SOURCE", help=f"judge these (default: what DIR draws): a folder, or {HELP}"
    )
    parser.add_argument(
        "--reference", metavar="SOURCE", help="as --pictures, or a .npz of statistics, pytorch-fid's too (no default)"
    )
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="Inception v3: what `dalle-jax convert inception` wrote, or a published file (no default)",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="a CLIP, for CLIP score and R-precision of pictures with captions (default: none)",
    )
    parser.add_argument(
        "--reconstructions",
        nargs="+",
        metavar="DIR",
        help="image tokenizers: instead of all this, how much of the pictures of --data each of them keeps (default: "
        "none)",
    )
    parser.add_argument("--data", metavar="SOURCE", help="with --reconstructions, as --pictures (no default)")
    parser.add_argument(
        "--lpips",
        metavar="DIR",
        help="with --reconstructions: what `dalle-jax convert lpips` wrote (default: none, the edge error)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("evaluation"),
        metavar="DIR",
        help="where the report and drawn pictures are written (default: evaluation)",
    )
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices that share one copy of the model (default: 1)"
    )
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="write the reference's statistics (default: no)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: as text)")
    for name in RENAMED:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    distributed.add_arguments(parser)
    parser.epilog = (
        "--config.key=value changes a value of the config, e.g. --config.source=coco:DIR or "
        "--config.measure.resize=clean; --reference, --weights and --clip are short for such words"
    )


def main(args: argparse.Namespace) -> int:
    """Writes OUT/report.json, report.md and blur.png and says the scores; 1 for a repetition with another FID, else 0.

    Of reconstructions it writes OUT/reconstructions.json, .md and .png.

    Raises:
      UserError: a source, weights or statistics that cannot be used, too few pictures, or options that exclude each
        other.
    """
    if args.reconstructions:
        return _reconstruct(args)
    for name in ("data", "lpips"):
        if getattr(args, name):
            raise UserError(
                f"expected --{name} only with --reconstructions DIR, got it without: add that, or leave it out"
            )
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
        made = evaluate(
            evaluation,
            model=args.model,
            out=args.out,
            worker=worker,
            tensor=args.tensor,
            save_statistics=args.save_statistics,
        )
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


def _reconstruct(args: argparse.Namespace) -> int:
    """Scores of image tokenizers, by this process alone."""
    others = ("model", "pictures", "reference", "clip", "save_statistics", "coordinator", "num_processes", "process_id")
    given = [name.replace("_", "-") for name in others if getattr(args, name) is not None]
    if given:
        what = "DIR" if given[0] == "model" else f"--{given[0]}"
        raise UserError(f"expected --reconstructions without {what}, got both: leave one out")
    spec = args.config or RECONSTRUCTIONS
    if config.load(spec).name != "reconstructions":
        raise UserError(f"expected {RECONSTRUCTIONS} with --reconstructions, got {spec}: leave it out")
    found = config.load(spec, _overrides(args, SHORT_OF_RECONSTRUCTIONS)).to_dict()
    del found["name"]
    worker = Worker(show=not args.json)
    made = reconstruct(Reconstructions(**found), args.reconstructions, out=args.out, worker=worker)
    for note in made["notes"]:
        errors.say(f"dalle-jax: note: {note}")
    path = args.out / reconstruction_report.TABLE
    print(json.dumps(made) if args.json else reconstruction_report.sentence(made, path))
    return 0


def _overrides(args: argparse.Namespace, short: Sequence[str]) -> list[str]:
    """The words that change a config, those of short flags last."""
    values = {name: getattr(args, name) for name in short}
    return [*args.overrides, *(f"{config.OVERRIDE}{name}={value}" for name, value in values.items() if value)]


def _read_options(args: argparse.Namespace) -> tuple[Evaluation, Processes]:
    """The evaluation, by a protocol or by a report, and the time limits of its processes."""
    for name, key in RENAMED.items():
        if getattr(args, name.replace("-", "_")) is not None:
            raise UserError(f"--{name} is now {key}: write that")
    overrides = _overrides(args, SHORT)
    if args.config and args.config.endswith(".json"):
        return _from_report(args, overrides), PROCESSES
    if not args.config and args.model:
        raise UserError(f"expected --config FILE.py:PROTOCOL with {args.model}, got none: for example {COCO}")
    if not (args.config or args.pictures):
        raise UserError(
            "expected --pictures, --reference and --weights, or DIR and --config, got no --pictures: give some"
        )
    return _from_protocol(args, overrides)


def _from_protocol(args: argparse.Namespace, overrides: list[str]) -> tuple[Evaluation, Processes]:
    if args.pictures and args.model:
        raise UserError("expected DIR, whose pictures are drawn, or --pictures, got both: leave one out")
    spec = args.config or SETS
    original, found = (config.load(spec, words).to_dict() for words in ([], overrides))
    if found["name"] != "evaluate":
        raise UserError(f"expected a protocol such as {COCO}, got {spec}: give one")
    original, values = (_evaluation_values(values, args.pictures) for values in (original, found))
    changed = config.differences(original, values) if values["protocol"] else {}
    values["departures"] = [
        f"{key} {b!r} instead of {a!r}" for key, (a, b) in sorted(changed.items()) if key not in FREE_KEYS
    ]
    return Evaluation.from_json(values, where=spec), Processes(**found["processes"])


def _evaluation_values(found: dict[str, Any], pictures: str | None) -> dict[str, Any]:
    """A config's values of an `Evaluation`; of given pictures a protocol takes as many as it would draw."""
    values = {key: value for key, value in found.items() if key not in OTHER_KEYS}
    if pictures:
        drawn = values.pop("draw", {"count": None})
        values |= {"pictures": pictures, "count": values["count"] or drawn["count"]}
    return values


def _from_report(args: argparse.Namespace, overrides: list[str]) -> Evaluation:
    """The evaluation of a report, with new places for what lies elsewhere now."""
    path = pathlib.Path(args.config)
    if args.pictures:
        raise UserError(f"expected --config.pictures=SOURCE to repeat {path}, got --pictures: write that")
    if args.out.resolve() == path.resolve().parent:
        raise UserError(f"expected another --out than {args.out}, where the report lies: parts of it would be reused")
    evaluation = report.load(path)
    for word in overrides:
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
