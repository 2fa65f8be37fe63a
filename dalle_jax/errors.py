"""The one exception that is meant for people, the check of a number, and the exit statuses of the command.

Raise `UserError` where a file, an option, a caption or a checkpoint from outside is wrong. The message is
one sentence: what was expected, what came, what to do. The command line prints it without a traceback and exits 2.
"""

import contextlib
import math
import numbers
import sys
from collections.abc import Iterable, Iterator
from typing import Any

MAX_SIZE = 1 << 24  # in a model: more would be a slip of the keyboard
EXIT_USER_ERROR = 2  # another try would end the same way
EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers give the same command again, which resumes
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
EXIT_PIPE = 141  # 128 + SIGPIPE: whoever reads the output has had enough


def say(line: str) -> None:
    """Print one line on stderr at once: what a program says beside its result."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """The first line of a library's exception, short enough for a sentence."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class UserError(Exception):
    """Something the user gave is wrong; `str(error)` is one clear sentence that says how to mend it."""


@contextlib.contextmanager
def writing_to(place: object, kind: str = "folder") -> Iterator[None]:
    """Raise UserError where the block cannot write to a place that the user named; kind: in the message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"expected a {kind} to write to, got {place} ({error.strerror or error}): choose another"
        ) from error


def check_choice(name: str, value: object, choices: Iterable[str], *, optional: bool = False) -> None:
    """Raises UserError for a value that is none of the choices, nor None if optional; name: as the user wrote it."""
    if not (optional and value is None) and value not in (choices := tuple(choices)):
        raise UserError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}: choose one of them")


def check_sizes(config: Any, *names: str, min: int = 1, max: int = MAX_SIZE) -> None:
    """Raises ValueError for a size in a model's config that is no whole number from min to max."""
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, numbers.Integral) and min <= int(value) <= max):
            raise ValueError(f"{name} must be at least {min}, at most {max:,} and whole, got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Refuse a value that is not a finite number in a range.

    name: of the option or config key, as the user wrote it. min, max: the range with its ends; above, below: without
    them. whole: an integer. optional: None is accepted too.

    Raises:
      UserError: with the range and what came.
    """
    if optional and value is None:
        return
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if (
        is_number
        and -math.inf < value < math.inf  # neither infinite nor NaN
        and (min is None or value >= min)
        and (max is None or value <= max)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return
    limits = {"of at least": min, "above": above, "of at most": max, "below": below}
    listed = " and".join(f" {words} {limit:,}" for words, limit in limits.items() if limit is not None)
    noun = "a whole number" if whole else "a number"
    or_none = ", or None" if optional else ""
    raise UserError(f"expected {name} to be {noun}{listed}{or_none}, got {value!r}: choose a value in this range")
