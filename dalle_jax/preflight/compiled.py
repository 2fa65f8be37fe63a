"""Compile a job's step for its topology and read what the compiler says: memory, collectives, or that it is too large.

The compiler is the judge of what fits; `memory.py` only explains it.
"""

import dataclasses
import re
import time
from typing import Any

import jax

from dalle_jax.preflight.collectives import Collective, read
from dalle_jax.preflight.job import Job, shard_bytes

# libtpu searches for fast code most of the time; without that it takes a quarter of it and asks for the same memory
# (12b on v5p-1024: 6.06 instead of 5.94 GB of temporaries).
OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"exec_time_optimization_effort": -1.0}}
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])")
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The compiler's answer. All bytes are of one chip.

    fits: total_bytes is within what a program may use, and the compiler made a program. total_bytes: arguments,
    results and temporaries at the fullest moment, and the code. argument_bytes, temporary_bytes, code_bytes: 0 where
    the compiler gave up. collectives: None where the program cannot be read.
    """

    fits: bool
    total_bytes: int
    argument_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    collectives: list[Collective] | None = None
    seconds: float = 0.0


def compile_update(job: Job) -> Verdict:
    """Compile a job's step. Raises what the compiler raises, except for a program that is too large for the chip."""
    began = time.monotonic()
    lowered = job.lower()
    try:
        compiled = lowered.compile(compiler_options=OPTIONS.get(job.topology.chip.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Verdict(fits=False, total_bytes=_wanted(str(error)), seconds=time.monotonic() - began)
    memory: Any = compiled.memory_analysis()
    # The step does not read all of the frozen image tokenizer (its decoder), which lies in memory nevertheless.
    held = shard_bytes([job.state, job.frozen, job.batch])
    arguments = max(held, memory.argument_size_in_bytes) - job.average_bytes_taken_off
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Verdict(
        fits=total <= job.topology.usable_bytes,
        total_bytes=total,
        argument_bytes=arguments,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=_collectives(compiled, job),
        seconds=time.monotonic() - began,
    )


def _collectives(compiled, job: Job) -> list[Collective] | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # libtpu cannot print some asynchronous updates
        return None
    return read(text, mesh_shape=dict(job.mesh.shape), slices=job.slices) if text else None


def _wanted(message: str) -> int:
    """Bytes that the compiler needed, as its refusal says; 0 if it does not say."""
    match = _USED.search(message)
    return int(float(match[1]) * _UNIT[match[2]]) if match else 0
