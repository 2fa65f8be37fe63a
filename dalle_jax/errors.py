"""The one exception that is meant for people.

Raise `UserError` where a file, an option, a caption or a checkpoint that came from outside is wrong. The message is
one sentence: what was expected, what came, what to do. The command line prints it without a traceback and exits 2.
"""


class UserError(Exception):
    """Something the user gave is wrong; `str(error)` is one clear sentence that says how to mend it."""
