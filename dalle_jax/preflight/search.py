"""The search for layouts: the figures of one job, the smallest change that makes it fit, and a sweep.

The byte model orders and prunes the candidates; only the compiler says whether one fits.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dalle_jax.errors import UserError, say
from dalle_jax.models.blocks import REMAT
from dalle_jax.preflight import memory, roofline
from dalle_jax.preflight.collectives import Collective
from dalle_jax.preflight.compiled import Verdict, compile_update
from dalle_jax.preflight.job import Job
from dalle_jax.preflight.topology import devices
from dalle_jax.sharding import MESH_AXES

MAX_COMPILED = 4  # candidates that a search for a change compiles
MAX_SWEPT = 12  # candidates that a sweep compiles, the fastest by the byte model and the roofline
MAX_PER_MESH = 3  # of them with one mesh
MARGIN = 1.15  # the byte model is trusted to this factor when it prunes


@dataclasses.dataclass(frozen=True)
class Result:
    """All figures of one job.

    changed: config keys that differ from what was asked for, or 'topology'. bytes: the byte model's, by kind.
    collectives: the compiled program's or, if there is none to read, those that the mesh makes necessary. sampling: see
    `memory.sampling`.
    """

    job: Job
    changed: Mapping[str, Any]
    bytes: Mapping[str, int]
    verdict: Verdict
    collectives: Sequence[Collective]
    estimate: roofline.Estimate
    sampling: memory.Sampling | None


def examine(job: Job, changed: Mapping[str, Any] | None = None) -> Result:
    """Compile one job and put all figures together. Raises UserError for an impossible mesh or batch."""
    model_bytes = memory.by_kind(job)
    verdict = compile_update(job)
    found = verdict.collectives
    if found is None:
        found = [c for c in roofline.expected(job) if c.bytes]
    return Result(job, changed or {}, model_bytes, verdict, found, roofline.estimate(job, found), memory.sampling(job))


def smallest_change(result: Result) -> Result | None:
    """The change with which the job fits, confirmed by compiling: of the fewest keys, then the fastest.

    One key is tried before two, and more chips of the same kind last. None if nothing that was tried fits. Says on
    stderr what it tries.
    """
    job = result.job
    found = (_confirmed(_combinations(job, keys)) for keys in (1, 2, 3))
    return next(filter(None, found), None) or _confirmed(_more_chips(job))


def sweep(job: Job) -> list[Result]:
    """Meshes, remat policies, batch sizes and microbatches, compiled and sorted by speed, what does not fit last.

    Says on stderr what it compiles.
    """
    settings = job.settings
    remats = [{"model.remat": r} for r in _remats(job)]
    batches = [{"batch_size": settings.batch_size * factor} for factor in (1, 2)]
    counts = [{"accumulate": settings.accumulate * 2**i} for i in range(8)]
    rest = itertools.product(remats or [{}], batches, counts)
    candidates = [{**a, **b, **c, **d} for b, c, d in rest for a in _meshes(job)]
    results, compiled = [], collections.Counter()
    for changed, candidate in _ranked(job, candidates, max_bytes=job.topology.usable_bytes * MARGIN):
        mesh = candidate.mesh.devices.shape
        if compiled[mesh] == MAX_PER_MESH or compiled.total() == MAX_SWEPT:
            continue
        compiled[mesh] += 1
        say(f"compiling {describe(changed)}")
        results.append(examine(candidate, changed))
    return sorted(results, key=lambda r: (not r.verdict.fits, -r.estimate.tokens_per_second))


def describe(changed: Mapping[str, Any]) -> str:
    """The changes as words of a command line."""
    words = [f"--topology {v}" if k == "topology" else f"--config.{k}={v}" for k, v in changed.items()]
    return " ".join(words) or "as asked"


def _confirmed(candidates: Iterable[tuple[dict[str, Any], Job]]) -> Result | None:
    """The first candidate that really fits; None if none of the first few does.

    One that does not shows by how much the byte model is too low here; with that factor others are left out.
    """
    factor, failed = 1.0, 0
    for changed, candidate in candidates:
        expected = memory.total(candidate)
        if expected * factor > candidate.topology.usable_bytes:
            continue
        say(f"trying {describe(changed)}")
        result = examine(candidate, changed)
        if result.verdict.fits:
            return result
        factor = max(factor, result.verdict.total_bytes / expected)
        failed += 1
        if failed == MAX_COMPILED:
            break
    return None


def _combinations(job: Job, keys: int) -> list[tuple[dict[str, Any], Job]]:
    """Jobs with this many changes that the byte model lets fit, fastest first."""
    options = [list(group) for group in _options(job) if group]
    candidates = [
        {key: value for change in chosen for key, value in change.items()}
        for groups in itertools.combinations(options, keys)
        for chosen in itertools.product(*groups)
    ]
    return _ranked(job, candidates, max_bytes=job.topology.usable_bytes)


def _options(job: Job) -> Iterator[list[dict[str, Any]]]:
    """Groups of changes; the changes of a group are values of the same setting."""
    settings, cut = job.settings, math.prod(job.mesh.devices.shape[1:])
    yield [{"accumulate": settings.accumulate * 2**i} for i in range(1, 11) if job.sequences % 2**i == 0]
    yield [{"model.remat": remat} for remat in _remats(job) if getattr(settings.model, "remat", None) != remat]
    yield [mesh for mesh in _meshes(job) if mesh["run.mesh.fsdp"] * mesh["run.mesh.tensor"] > cut]
    yield [{"optimizer.moments": "bf16"}] * (settings.optimizer.moments == "fp32")  # the paper's have 16 bits already
    yield [{"storage.params": "bf16"}] * (settings.storage.params == "fp32")


def _meshes(job: Job) -> list[dict[str, int]]:
    """Config keys of every layout that the training would accept."""
    return [{f"run.mesh.{axis}": n for axis, n in zip(MESH_AXES, shape, strict=True)} for shape in job.layouts]


def _remats(job: Job) -> list[str]:
    return list(REMAT) if hasattr(job.settings.model, "remat") else []


def _more_chips(job: Job) -> Iterator[tuple[dict[str, Any], Job]]:
    """The same config on 2, 4, 8 ... times the chips, with what the byte model lets fit there.

    One after the other, as each takes seconds to find.
    """
    chosen = {"run.mesh.replica": None, "run.mesh.fsdp": None}  # sizes for these chips say nothing about more
    mesh = dataclasses.asdict(job.settings.run.mesh)
    asked = {key: None for key in chosen if mesh[key.removeprefix("run.mesh.")] is not None}
    shape = list(job.topology.shape)
    for _ in range(5):
        smallest = 0 if job.topology.chip.platform == "gpu" else shape.index(min(shape))
        shape[smallest] *= 2
        pod = dataclasses.replace(job.topology, shape=tuple(shape))
        try:
            larger = dataclasses.replace(job.changed(chosen), topology=pod, devices=tuple(devices(pod)))
            options = next(filter(None, (_combinations(larger, keys) for keys in (0, 1, 2))), [])
        except UserError:  # a slice that does not exist, or a batch that does not divide
            continue
        for changed, candidate in options:
            yield {"topology": str(pod), **asked, **changed}, candidate


def _ranked(job: Job, candidates, *, max_bytes: float) -> list[tuple[dict[str, Any], Job]]:
    """The possible ones that the byte model puts below max_bytes, in the order of the roofline, fastest first."""
    ranked = []
    for changed in candidates:
        try:
            candidate = job.changed(changed)
            if memory.total(candidate) <= max_bytes:
                guess = roofline.estimate(candidate, roofline.expected(candidate))
                # Of two with the same bound, first the one that leaves the other resources more slack.
                order = -guess.tokens_per_second, sum(guess.seconds.values()) / guess.tokens, len(ranked)
                ranked.append((order, changed, candidate))
        except UserError:
            continue
    return [(changed, candidate) for _, changed, candidate in sorted(ranked, key=lambda r: r[0])]
