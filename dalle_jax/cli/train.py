"""`dalle-jax train`: one run of any task, with samples drawn along the way where the task can draw them."""

import argparse
import pathlib
import signal

from dalle_jax import config as configs
from dalle_jax import distributed
from dalle_jax.cli.hooks import hooks_of
from dalle_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART, UserError
from dalle_jax.train.monitor import tracing
from dalle_jax.train.run import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE.py:VARIANT", help="e.g. configs/transformer.py:demo")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="everything is written here; again to resume")
    parser.add_argument(
        "--profile",
        type=tracing.window,
        metavar="START:STOP",
        help="trace the updates from START to before STOP into DIR/profile, for XProf or TensorBoard",
    )
    distributed.add_arguments(parser)
    parser.epilog = "--config.key=value changes a value of the config, e.g. --config.steps=1000"


def main(args: argparse.Namespace) -> int:
    """Returns 0, EXIT_INTERRUPTED after Ctrl-C, or EXIT_RESTART if a SIGTERM stopped the run before its end.

    Schedulers send SIGTERM to take a machine away, so the launchers start the same command again on EXIT_RESTART.
    """
    config, workdir = configs.load(args.config, args.overrides), pathlib.Path(args.workdir)
    if args.profile and args.profile.start > config.get("steps", args.profile.start):
        raise UserError(
            f"expected a START of --profile of at most config.steps = {config.steps}, got {args.profile.start}"
        )
    distributed.initialize(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        start_seconds=config.processes.start_seconds,
        hang_seconds=config.processes.hang_seconds,
    )
    result = train(config, workdir, hooks=hooks_of(config, workdir), profile=args.profile)
    if not result.signal or result.step == config.steps:
        return 0
    return EXIT_INTERRUPTED if result.signal == signal.SIGINT else EXIT_RESTART
