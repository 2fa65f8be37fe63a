"""The figures of a preflight as text for a person."""

from collections.abc import Sequence

from dalle_jax.preflight.search import Result, describe

GB = 1e9
NAMES = {"frozen": "image tokenizer", "ema": "moving average", "compression": "left out", "memory": "codebook counts"}


def table(result: Result, change: Result | None) -> str:
    """All figures of one job, the verdict last. change: what makes it fit, if it does not."""
    job, verdict, guess = result.job, result.verdict, result.estimate
    chip, mesh, work = job.topology.chip, job.mesh.shape, job.work
    total = sum(result.bytes.values())
    lines = [
        f"{job.settings.name} of {job.task.model.num_params:,} parameters on {job.topology}, "
        f"{job.topology.count} chips in {job.topology.slice_noun}s of {job.topology.slice_size}",
        f"mesh replica {mesh['replica']} x fsdp {mesh['fsdp']} x tensor {mesh['tensor']}; batch "
        f"{job.settings.batch_size:,}, {job.sequences} a chip at once, {job.settings.accumulate} microbatch(es)",
        "",
        "bytes per chip, GB",
    ]
    lines += [f"  {NAMES.get(kind, kind):<16}{size / GB:>9.3f}" for kind, size in result.bytes.items()]
    lines += [f"  {'total':<16}{total / GB:>9.3f}   by our model"]
    lines += [f"  {'':<16}{verdict.total_bytes / GB:>9.3f}   by the compiler{_parts(verdict)}"]
    lines += [
        f"  {'chip':<16}{chip.memory_bytes / GB:>9.3f}   a program may use {job.topology.usable_bytes / GB:.3f}",
        *_sampling(result),
        "",
        f"FLOPs per sequence {work.model_flops:.4g}, with recomputation and the image tokenizer "
        f"{work.executed_flops:.4g}; per step {work.model_flops * job.settings.batch_size:.4g}",
        "",
        *_collectives(result),
        *_compression(job),
        "",
        "estimated seconds per step: "
        + ", ".join(f"{name} {seconds:.3g}" for name, seconds in guess.seconds.items())
        + f"; bound by {guess.binding}",
        f"estimated tokens per second {guess.tokens_per_second:,.0f}, "
        f"{guess.tokens_per_second / job.topology.count:,.0f} a chip; {guess.days:,.1f} days for {guess.steps:,} steps",
        "",
        f"{'FITS' if verdict.fits else 'DOES NOT FIT'} (compiled in {verdict.seconds:.0f} s)",
    ]
    if not verdict.fits:
        lines.append(_change(change))
    return "\n".join(lines)


def sweep_table(results: Sequence[Result]) -> str:
    """One line a layout, fastest first, what does not fit last."""
    head = f"{'tokens/s':>12} {'step s':>8} {'bound by':<9} {'GB':>8}  {'':<13} {'layout'}"
    rows = [
        f"{r.estimate.tokens_per_second:>12,.0f} {r.estimate.step_seconds:>8.3g} {r.estimate.binding:<9} "
        f"{r.verdict.total_bytes / GB:>8.2f}  {'fits' if r.verdict.fits else 'does not fit':<13} {describe(r.changed)}"
        for r in results
    ]
    return "\n".join([head, *rows]) if rows else "no layout of the sweep comes near to fitting: use more chips"


def _parts(verdict) -> str:
    if not verdict.argument_bytes:
        return ", which gave up" if verdict.total_bytes else ", which gave up without a number"
    return (
        f": arguments {verdict.argument_bytes / GB:.3f}, temporaries {verdict.temporary_bytes / GB:.3f}, "
        f"code {verdict.code_bytes / GB:.3f}"
    )


def _sampling(result: Result) -> list[str]:
    if (found := result.sampling) is None:
        return []
    devices = f"each of {found.devices} devices" if found.devices > 1 else "a device"
    outcome = "" if found.fits else ": DOES NOT FIT, so the training goes on without them"
    return [
        f"  {'samples':<16}{found.weights / GB:>9.3f}   of weights on {devices} of the first process, between steps "
        f"beside {found.held / GB:.3f}{outcome}"
    ]


def _collectives(result: Result) -> list[str]:
    by = "" if result.verdict.collectives is not None else "   by our model: the compiler gave no program to read"
    lines = [f"collectives per step        times  GB received by a chip{by}"]
    for c in result.collectives:
        where = "" if c.inside else f"  between {result.job.topology.slice_noun}s"
        lines.append(f"  {c.kind:<18} {c.count:>12,} {c.bytes / GB:>10.3f}  along {c.axis}{where}")
    return lines


def _compression(job) -> list[str]:
    sent, instead = job.across_replicas
    if sent == instead:
        return []
    return [
        f"gradients that a chip averages across replicas: {sent / GB:.3f} GB instead of {instead / GB:.3f}, which "
        f"saves {1 - sent / instead:.0%}"
    ]


def _change(change: Result | None) -> str:
    if change is None:
        return "no change that was tried makes it fit: use more chips or chips with more memory"
    return (
        f"fits with {describe(change.changed)}: {change.verdict.total_bytes / GB:.3f} GB, "
        f"{change.estimate.tokens_per_second:,.0f} tokens/s, {change.estimate.days:,.1f} days"
    )
