"""Runs every command of docs/pods_preflight.md again and puts what it prints in the place of the table below it.

    python docs/make/preflight_tables.py            # all of them; needs libtpu and JAX's CUDA plugin
    python docs/make/preflight_tables.py v5p v4     # those whose command holds one of these words

A table is replaced as soon as its command has ended, so what is interrupted is not lost.
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys

DOCUMENT = pathlib.Path(__file__).resolve().parent.parent / "pods_preflight.md"
TABLE = re.compile(
    r"^    \$ dalle-jax (?P<command>preflight [^\n]*)\n\n```\n(?P<printed>.*?)^```$", re.MULTILINE | re.DOTALL
)
EXIT_DOES_NOT_FIT = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only commands that hold one of these words")
    words = parser.parse_args().words
    commands = [found["command"] for found in TABLE.finditer(DOCUMENT.read_text())]
    chosen = [command for command in commands if not words or any(word in command for word in words)]
    failed = 0
    for command in chosen:
        print(f"dalle-jax {command}", file=sys.stderr, flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        arguments = [sys.executable, "-m", "dalle_jax.cli", *shlex.split(command)]
        result = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True)
        if result.returncode not in (0, EXIT_DOES_NOT_FIT):
            print(f"    failed with status {result.returncode}: its table stays", file=sys.stderr)
            failed += 1
            continue
        replace(command, result.stdout)
    print(f"{len(chosen) - failed} of {len(chosen)} tables written to {DOCUMENT}")
    return 1 if failed else 0


def replace(command: str, printed: str) -> None:
    def renewed(found):
        if found["command"] != command:
            return found[0]
        return f"    $ dalle-jax {command}\n\n```\n{printed.rstrip()}\n```"

    DOCUMENT.write_text(TABLE.sub(renewed, DOCUMENT.read_text()))


if __name__ == "__main__":
    sys.exit(main())
