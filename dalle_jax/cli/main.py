"""The `dalle-jax` command: parse, then one call into the module that does the verb's work.

A verb's module offers `add_arguments(parser)` and `main(args) -> exit status`, and is imported only when its verb is
on the command line, so that `--help` does not wait for JAX. A mistake of the user (`UserError`) is one line on stderr
and exit status 2; any other exception is a defect and keeps its traceback.
"""

import argparse
import importlib
import io
import os
import re
import select
import sys
from collections.abc import Sequence

import dalle_jax
from dalle_jax import signals
from dalle_jax.cli import host_memory
from dalle_jax.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_USER_ERROR, UserError, say

# verb -> (module, what --help says)
VERBS = {
    "demo": ("dalle_jax.cli.demo", "train everything on generated scenes and draw captions never seen, in minutes"),
    "data": ("dalle_jax.cli.data", "report what a source of captioned pictures holds and what would be dropped"),
    "index": ("dalle_jax.cli.index", "find the records of many tar shards once, with all processors"),
    "tokenizer": ("dalle_jax.cli.tokenizer", "train a BPE tokenizer on the captions of a source"),
    "encode": ("dalle_jax.cli.encode", "turn the images of a source into image tokens once, to train a transformer on"),
    "train": ("dalle_jax.cli.train", "train a model, or go on with the training in a workdir"),
    "inspect": ("dalle_jax.cli.inspect", "say where a run stands: step, data, digests, checkpoints, goodput"),
    "preflight": ("dalle_jax.cli.preflight", "say whether a config fits a pod that is not here, and how fast it is"),
    "export": ("dalle_jax.cli.export", "write the parameters of a run as a model directory (safetensors)"),
    "sample": ("dalle_jax.cli.sample", "draw pictures for captions"),
    "evaluate": ("dalle_jax.cli.evaluate", "say how far pictures are from a reference set: FID, IS, KID, precision"),
    "serve": ("dalle_jax.cli.serve", "answer OpenAI's Images API over HTTP, with a page for people"),
    "convert": ("dalle_jax.cli.convert", "turn published weights into a model directory"),
}
OVERRIDE = "--config."
_HOME = re.compile(r"^(--[\w.-]+=)?(~[\w.-]*(?:/.*)?)$", re.DOTALL)
OVERRIDDEN = ("train", "preflight", "evaluate")  # verbs whose config can be changed on the command line


class _Parser(argparse.ArgumentParser):
    """argparse that answers a wrong command line as a `UserError`: one sentence instead of a usage block."""

    words: Sequence[str] = ()  # that follow its verb on the command line

    def error(self, message: str):
        options = self._option_string_actions
        dashed = [word for word in self.words if re.match(r"-[^-\d]", word) and word[:2] not in options]
        hint = f"; if {dashed[0]} is no option, put -- before it" if dashed else ""
        raise UserError(f"{message}{hint} (see `{self.prog} --help`)")


def _add_verbs(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """One subparser per verb; only the verb that `words` begins with imports its module and gets arguments.

    Returns: the parser of that verb, which names its `--help` in errors; without such a verb, the one that was given.
    """
    chosen = parser
    subparsers = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    for verb, (module, summary) in VERBS.items():
        child = subparsers.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        if words and words[0] == verb:
            work = importlib.import_module(module)
            work.add_arguments(child)
            child.set_defaults(main=work.main)
            chosen, child.words = child, words[1:]
    return chosen


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace: `main` is what to call with it.

    `~` at the beginning of a path is the home of its user, after `--option=` too, where shells leave it as it is. Words
    `--config.key=value` are not options of argparse: for the verbs of OVERRIDDEN, `overrides` holds them in
    their order.

    Raises:
      UserError: unknown verb or option, a missing or malformed value.
    """
    argv = [_HOME.sub(lambda found: f"{found[1] or ''}{os.path.expanduser(found[2])}", word) for word in argv]
    overrides = [word for word in argv if word.startswith(OVERRIDE)]
    words = [word for word in argv if not word.startswith(OVERRIDE)]
    parser = _Parser(prog="dalle-jax", description=dalle_jax.__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dalle-jax {dalle_jax.__version__}")
    of_verb = _add_verbs(parser, words)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        of_verb.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides and words[0] not in OVERRIDDEN:
        verbs = " or ".join(f"`{verb}`" for verb in OVERRIDDEN)
        raise UserError(f"expected {OVERRIDE}key=value only after {verbs}, got {overrides[0]!r}: leave it out")
    for word in overrides:
        if "=" not in word:
            raise UserError(f"expected {OVERRIDE}key=value, got {word!r}: join key and value with =")
    if words[0] in OVERRIDDEN:
        args.overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    host_memory.keep_freed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be text
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status = args.main(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if signals.ending():
            return _interrupted()
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_PIPE
        if isinstance(error, UserError):
            say(f"dalle-jax: error: {error}")
        elif wanted := _missing_platform():
            say(
                f"dalle-jax: error: expected a device for JAX_PLATFORMS={wanted}, got none that JAX can use: set it to "
                "what this machine has, or unset it, and JAX chooses"
            )
        else:
            raise
        return EXIT_USER_ERROR


def command() -> None:
    """The process `dalle-jax`: `main`, which Ctrl-C ends whatever it is doing."""
    try:
        signals.watch()
        status = main()
    except KeyboardInterrupt:  # before `main` has begun
        status = _interrupted()
    sys.exit(status)


def _interrupted() -> int:
    say("dalle-jax: interrupted")
    signals.end()
    return EXIT_INTERRUPTED


def _missing_platform() -> str | None:
    """The platforms that the user has asked for, if JAX has no device of them; whatever is called then fails."""
    if (jax := sys.modules.get("jax")) is None or not (wanted := jax.config.jax_platforms):
        return None
    try:
        jax.devices()
    except Exception:  # an AssertionError without a word among others
        return wanted
    return None


def _reader_is_gone() -> bool:
    """Whether whoever reads stdout has had enough, as `| head` has; if so, silence what Python would say at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
