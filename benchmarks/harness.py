"""What the benchmarks share: arguments, rounds in turns, a description of the machine, notes, results as Markdown.

A result is one file `results/NAME.md` with a section for each part that can be measured by itself; measuring a part
again replaces its section. Only the standard library is needed here, because the environments of peers lack the rest.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dalle_jax.cli import host_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.5  # load average above which a warning is printed
# Each side of a comparison keeps freed memory, as every `dalle-jax` command does (`cli/host_memory.py`).
KEEP_FREED = {name: str(value) for name, (_, value) in host_memory.SETTINGS.items()}


def parser(doc: str, *, rounds: int | None = None, out: str | None = None, peer: bool = False):
    """An argument parser described by the first line of a docstring, with the options that many benchmarks have.

    rounds: default of --rounds. out: what --out is for. peer: whether there is a --peer-python.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    made.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the table")
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds, help=f"measure everything so often (default {rounds})")
    if out:
        made.add_argument("--out", type=pathlib.Path, required=True, help=out)
    if peer:
        made.add_argument("--peer-python", required=True, help="the interpreter of the peer's environment")
    return made


def two_cpus(cpus: int = 2) -> None:
    """Bind this process and its children to that many processors, and JAX to them; call it before JAX computes."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"
    host_memory.keep_freed()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    if os.getloadavg()[0] > BUSY:
        log(f"warning: the machine is busy (load {os.getloadavg()[0]:.2f}), which slows every side")


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*more: str) -> str:
    """Date, processor, load and versions in one line, and what else is given."""
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    parts = [
        datetime.date.today().isoformat(),
        f"{cores()} x {name[1] if name else platform.machine()}",
        f"load {os.getloadavg()[0]:.2f}",
        f"Python {platform.python_version()}",
        f"JAX {importlib.metadata.version('jax')}",
    ]
    return ", ".join([*parts, *more]) + "."


def command(args: argparse.Namespace, **shown: str) -> list[str]:
    """Lines of Markdown with the command that runs.

    Placeholders: DIR for folders, and for the options named in `shown` their text.
    """
    path = pathlib.Path(sys.argv[0]).resolve()
    if path.is_relative_to(ROOT / "benchmarks"):
        run = f"python -m {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
    else:
        run = f"PYTHONPATH=. python docs/make/{path.name}"
    values = {str(vars(args)[name]): text for name, text in ({"out": "DIR", "model": "DIR"} | shown).items()
              if vars(args).get(name) is not None}  # fmt: skip
    words = shlex.join(values.get(word, word) for word in sys.argv[1:])
    return ["", f"    {run} {words}".rstrip(), ""]


def seconds(work: Callable[[], Any]) -> float:
    """Of one call; where it returns JAX's arrays, until they are there."""
    began = time.perf_counter()
    result = work()
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    return time.perf_counter() - began


def transformer_inputs(folder: pathlib.Path, config: str, **sizes: Any) -> dict[str, pathlib.Path]:
    """What a transformer's training needs, made in `folder`: config key -> a random dVAE of this config, a tokenizer.

    sizes: of the dVAE, where they differ from its config's.
    """
    import jax

    from dalle_jax import model_dir
    from dalle_jax.cli import demo
    from dalle_jax.models import build
    from dalle_jax.train.settings import load_settings

    values = dataclasses.asdict(load_settings(config).model) | sizes
    params = jax.jit(build("dvae", values).init)(jax.random.key(0))
    model_dir.save(folder / "dvae", {"name": "dvae", "model": values}, params)
    return {"frozen.image_tokenizer": folder / "dvae", "tokenizer": demo.make_tokenizer(folder)}


def training_step(
    settings: Any, batch: Mapping[str, Any], frozen: Mapping[str, Any] | None = None
) -> Callable[[], Any]:
    """One step of a training on all devices, as its loop calls it. frozen: role -> `ModelDir`."""
    import jax

    from dalle_jax import sharding
    from dalle_jax.mesh import make_mesh
    from dalle_jax.train import run
    from dalle_jax.train.objectives import build_task

    task, mesh, key = build_task(settings, frozen or {}), make_mesh({}), jax.random.key(0)
    training, placed = run.step_for(settings, task, mesh), sharding.shard_batch(batch, mesh)
    state = training.init(key)

    def step():
        nonlocal state
        state, metrics = training.update(state, task.frozen, placed, key)
        return state, metrics

    return step


def in_turns(
    works: Mapping[str, Callable[[], float]], rounds: int, *, slow: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Measure each work once a round, all in turns, so that what else the machine does hits them alike.

    slow: works that only the first so many rounds measure.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            if number < (slow or {}).get(name, rounds):
                found[name].append(work())
                log(f"round {number + 1}: {name} {found[name][-1]:.4g}")
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round; the side with fewer rounds decides how many."""
    return [a / b for a, b in zip(above, below, strict=False)]


def spread(values: Sequence[float], form: str = ".2f", unit: str = "x") -> str:
    """The middle of the rounds with the lowest and the highest: '1.08x (0.96 to 1.21)'."""
    return f"{statistics.median(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def met(value: float, bar: float | None) -> str:
    """Whether a ratio reaches its bar; nothing where there is none."""
    return "" if bar is None else f"{bar:g}x: {'met' if value >= bar else 'not met'}"


def table(header: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a Markdown table. header: its cells, separated by '|'."""
    cells = [cell.strip() for cell in header.split("|")]
    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    return lines + [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]


def write(path: pathlib.Path, title: str, lines: Sequence[str], *, section: str = "") -> str:
    """Write a result, or one section of it where the others stay; returns the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not section:
        sections = {"": "\n".join(lines)}
    else:
        before = path.read_text() if path.exists() else ""
        parts = re.split(r"^## (.*)\n", before, flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True)) | {section: "\n".join(lines)}
    text = f"# {title}\n"
    for name, body in sections.items():
        text += f"\n## {name}\n\n{body.strip()}\n" if name else f"\n{body.strip()}\n"
    path.write_text(text)
    print(text)
    return text


class Notes(dict):
    """Figures in a JSON file, written as soon as each is there: a call goes on where an earlier one has ended."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        super().__init__(json.loads(path.read_text()) if path.exists() else {})

    def __setitem__(self, name: str, figures: Any) -> None:
        super().__setitem__(name, figures)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self, indent=1) + "\n")
