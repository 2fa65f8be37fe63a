"""`dalle-jax train`: one run of any task, with samples drawn along the way where the task can draw them."""

import argparse
import pathlib
import signal

from dalle_jax import config, distributed
from dalle_jax.cli.hooks import hooks_of
from dalle_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART, UserError
from dalle_jax.text import has_tokenizer, load_tokenizer
from dalle_jax.train.monitor import tracing
from dalle_jax.train.run import train
from dalle_jax.train.settings import TrainSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py:VARIANT", help="e.g. configs/transformer.py:demo")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="everything is written here; again to resume")
    parser.add_argument(
        "--profile",
        type=tracing.window,
        metavar="START:STOP",
        help="trace the updates from START to before STOP into DIR/profile, for XProf or TensorBoard (default: no)",
    )
    distributed.add_arguments(parser)
    parser.epilog = "--config.key=value changes a value of the config, e.g. --config.run.steps=1000"


def main(args: argparse.Namespace) -> int:
    """Returns 0, EXIT_INTERRUPTED after Ctrl-C, or EXIT_RESTART if a SIGTERM stopped the run before its end.

    Schedulers send SIGTERM to take a machine away, so the launchers start the same command again on EXIT_RESTART.
    """
    workdir = pathlib.Path(args.workdir)
    settings = _settings(args.config, args.overrides, workdir)
    if args.profile and args.profile.start > settings.run.steps:
        raise UserError(
            f"expected a START of --profile of at most config.run.steps = {settings.run.steps}, got "
            f"{args.profile.start}: choose an earlier one"
        )
    distributed.initialize(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        start_seconds=settings.run.processes.start_seconds,
        hang_seconds=settings.run.processes.hang_seconds,
    )
    result = train(settings, workdir, hooks=hooks_of(settings, workdir), profile=args.profile)
    if not result.signal or result.step == settings.run.steps:
        return 0
    return EXIT_INTERRUPTED if result.signal == signal.SIGINT else EXIT_RESTART


def _settings(spec: str, overrides: list[str], workdir: pathlib.Path) -> TrainSettings:
    """The settings that were asked for; a text vocabulary of None has the size of the tokenizer."""
    values = config.load(spec, overrides).to_dict()
    model = values.get("model", {})
    if "text_vocab" in model and model["text_vocab"] is None:
        place = workdir if has_tokenizer(workdir) else values["tokenizer"]
        if place is None:
            raise UserError("a text_vocab of None needs a tokenizer: give its file as --config.tokenizer=FILE")
        model["text_vocab"] = load_tokenizer(place).vocab_size
    return TrainSettings.of(values)
