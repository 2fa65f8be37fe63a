"""`dalle-jax evaluate`: how far pictures are from a reference set, and a report from which others can repeat it."""

import argparse
import json
import pathlib

import jax

from dalle_jax import config as configs
from dalle_jax import distributed
from dalle_jax.data.sources import HELP
from dalle_jax.errors import UserError, say
from dalle_jax.evaluate import repeat, report, self_check
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.features import Extractor
from dalle_jax.evaluate.protocol import CROPS, RESIZES, Evaluation
from dalle_jax.evaluate.repeat import Expected
from dalle_jax.evaluate.run import evaluate

EXIT_FAILED = 1
# Flag -> the key of a config that says the same.
IN_CONFIG = {
    "reference": "reference", "weights": "weights", "clip": "clip", "resize": "measure.resize", "crop": "measure.crop",
    "reference_crop": "measure.reference_crop", "side": "measure.side", "blur": "measure.blur", "count": "count",
    "splits": "measure.splits", "seed": "measure.seed",
}  # fmt: skip
PROCESSES = {"start_seconds": 300, "hang_seconds": 600, "compile_seconds": 3_600}  # where no config says it
NOT_PROTOCOL = ("name", "processes")  # keys of a config that decide no score
FREE = (*repeat.PLACES, "draw.shard_size", "overlap.least")  # values that a protocol leaves to the user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="DIR", help="workdir of the transformer that draws, with --config")
    parser.add_argument("--config", metavar="FILE.py:PROTOCOL", help="a whole protocol, e.g. configs/evaluate.py:coco")
    parser.add_argument("--from", dest="from_", type=pathlib.Path, metavar="REPORT", help="repeat this report.json")
    parser.add_argument("--pictures", metavar="SOURCE", help=f"judge these: a folder of pictures, or {HELP}")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("evaluation"), metavar="DIR")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="write the reference's statistics for later")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--self-check", action="store_true", help="check the distances themselves on built-in pictures")
    alone = parser.add_argument_group("without a config")
    alone.add_argument(
        "--reference", metavar="SOURCE", help="as --pictures, or a .npz of statistics, pytorch-fid's too"
    )
    alone.add_argument(
        "--weights", metavar="PATH", help="Inception v3: what `dalle-jax convert inception` wrote, or a published file"
    )
    alone.add_argument("--clip", metavar="DIR", help="a CLIP, for CLIP score and R-precision of pictures with captions")
    alone.add_argument("--resize", choices=RESIZES, help="default: pytorch")
    alone.add_argument("--crop", choices=CROPS, help="of the pictures (default none)")
    alone.add_argument("--reference-crop", choices=CROPS, help="default: as --crop")
    alone.add_argument("--side", type=int, metavar="S", help="bring cropped pictures to S pixels before the blur")
    alone.add_argument("--blur", type=float, nargs="+", metavar="R", help="Gaussian blur of both sets, in pixels")
    alone.add_argument("--count", type=int, metavar="N", help="N pictures of each source, drawn by the seed")
    alone.add_argument("--splits", type=int, help="of the Inception score (default 10)")
    alone.add_argument("--seed", type=int, help="of draws, splits and subsets (default 0)")
    distributed.add_arguments(parser)
    parser.epilog = "--config.key=value changes a value of the config, e.g. --config.source=coco:DIR"


def main(args: argparse.Namespace) -> int:
    """Writes OUT/report.json, report.md and blur.png and says the scores: 0, and of a self-check or a repetition 1 if
    it does not come out as it must.

    Raises:
      UserError: a source, weights or statistics that do not do, too few pictures, or words that do not go together.
    """
    if args.self_check:
        return _self_check(args)
    evaluation, expected, limits = _asked(args)
    where = {"coordinator": args.coordinator, "num_processes": args.num_processes, "process_id": args.process_id}
    distributed.initialize(**where, start_seconds=limits["start_seconds"], hang_seconds=limits["hang_seconds"])
    with distributed.Watchdog(
        limits["hang_seconds"], first_seconds=limits["compile_seconds"], start_seconds=limits["start_seconds"]
    ) as watchdog:
        distributed.gather_json(None)  # the first collective connects all
        crew = Crew(
            jax.process_index(),
            jax.process_count(),
            beat=lambda phase: watchdog.beat(0, phase),
            meet=lambda: distributed.gather_json(None),
        )
        made = evaluate(
            evaluation,
            model=args.model,
            out=args.out,
            crew=crew,
            tell=not args.json,
            expected=expected,
            save_statistics=args.save_statistics,
        )
    if made is None:
        return 0
    for note in made["notes"]:
        say(f"dalle-jax: note: {note}")
    print(json.dumps(made) if args.json else report.sentence(made, args.out / report.REPORT))
    if "repeats" not in made:
        return 0
    told, same = Expected.told(made)
    say(told)
    return 0 if same else EXIT_FAILED


def _asked(args: argparse.Namespace) -> tuple[Evaluation, Expected, dict[str, int]]:
    """What to evaluate: by a config, by a report or by flags; and how long processes wait for one another."""
    flags = [name for name in IN_CONFIG if getattr(args, name) is not None]
    if args.config or args.from_:
        if args.config and args.from_:
            raise UserError("expected --config or --from, got both: a report has its own protocol")
        if flags:
            key = f"--config.{IN_CONFIG[flags[0]]}=..."
            raise UserError(
                f"expected {key} instead of --{flags[0].replace('_', '-')}, as a protocol says it: write that"
            )
    if args.from_:
        if args.pictures:
            raise UserError("expected --config.pictures=SOURCE with --from, got --pictures: write that")
        if args.out.resolve() == args.from_.resolve().parent:
            raise UserError(
                f"expected another --out than {args.out}, where the report lies: what is there would not be made anew"
            )
        return *repeat.load(args.from_, args.overrides), PROCESSES
    if args.config:
        config = configs.load(args.config, args.overrides).to_dict()
        if config["name"] != "evaluate":
            raise UserError(f"expected a protocol such as configs/evaluate.py:coco, got {args.config}: give one")
        if args.pictures and args.model:
            raise UserError("expected DIR, whose pictures are drawn, or --pictures, got both: leave one out")
        values, own = (_values(found, args.pictures) for found in (config, configs.load(args.config, []).to_dict()))
        values["departures"] = _departures(own, values)
        return Evaluation.from_json(values, where=args.config), Expected(), config["processes"]
    return _by_flags(args), Expected(), PROCESSES


def _values(config: dict, pictures: str | None) -> dict:
    """A config's values of an `Evaluation`; of given pictures a protocol takes as many as it would draw."""
    values = {key: value for key, value in config.items() if key not in NOT_PROTOCOL}
    if pictures:
        values |= {"pictures": pictures, "count": values["count"] or values["draw"]["count"], "draw": None}
    return values


def _departures(own: dict, values: dict) -> list[str]:
    """What is not as the protocol itself has it."""
    changed = configs.differences(own, values)
    return [f"{key} {b!r} instead of {a!r}" for key, (a, b) in sorted(changed.items()) if key not in FREE]


def _by_flags(args: argparse.Namespace) -> Evaluation:
    if args.model or args.overrides:
        word = args.model or args.overrides[0]
        raise UserError(f"expected --config FILE.py:PROTOCOL with {word}, got none: e.g. configs/evaluate.py:coco")
    for name in ("pictures", "reference", "weights"):
        if getattr(args, name) is None:
            raise UserError(
                "expected --pictures, --reference and --weights, or DIR and --config, or --self-check, "
                f"got no --{name}: add it"
            )
    if args.count is not None and args.count < 2:
        raise UserError(f"expected --count of at least 2, got --count {args.count}")
    given = {
        name: getattr(args, name) for name in ("resize", "crop", "reference_crop", "side", "blur", "splits", "seed")
    }
    values = {
        "pictures": args.pictures,
        "reference": args.reference,
        "weights": args.weights,
        "clip": args.clip or "",
        "count": args.count or 0,
        "reference_count": args.count or 0,
        "measure": {name: value for name, value in given.items() if value is not None},
    }
    return Evaluation.from_json(values, where="the command line")


def _self_check(args: argparse.Namespace) -> int:
    extractor = Extractor.load(args.weights) if args.weights else self_check.random_network()
    checks = self_check.run(extractor)
    ok = all(check.ok for check in checks)
    if args.json:
        listed = [{"name": check.name, "ok": check.ok, "found": check.found} for check in checks]
        print(json.dumps({"ok": ok, "network": extractor.network, "checks": listed}))
    else:
        for check in checks:
            print(f"{'pass' if check.ok else 'FAIL'}  {check.name}: {check.found}")
        print(f"self-check {'passed' if ok else 'FAILED'} with {extractor.network}")
    return 0 if ok else EXIT_FAILED
