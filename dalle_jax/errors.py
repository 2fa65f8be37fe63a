"""The one exception that is meant for people, and what the command says to the shell when it ends.

Raise `UserError` where a file, an option, a caption or a checkpoint that came from outside is wrong. The message is
one sentence: what was expected, what came, what to do. The command line prints it without a traceback and exits 2.
"""

EXIT_USER_ERROR = 2  # once more would end the same way
EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers start the same command again, which goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class UserError(Exception):
    """Something the user gave is wrong; `str(error)` is one clear sentence that says how to mend it."""
