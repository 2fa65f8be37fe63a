"""How fast, next to whom, and how reliably: run from the repository's root as `python -m benchmarks.ROOM.NAME`."""
