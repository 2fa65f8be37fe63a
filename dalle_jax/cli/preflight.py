"""`dalle-jax preflight`: whether a config fits a pod that is not here, how fast it would be, what would make it fit.

Compiles the real training step with the pod's compiler; needs no accelerator. JAX is set up for the other platform
before anything imports it, so this module and `topology.py` import it late.
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from dalle_jax import config as configs
from dalle_jax.errors import UserError
from dalle_jax.preflight import topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py:VARIANT", help="for example configs/transformer.py:12b (required)"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="POD",
        help=f"{topology.FORM}, for example tpu:v5p:8x8x16 or gpu:h100:128x8 (required)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all figures as one JSON object (default: a table for people)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="compile other meshes, batches, microbatches and rematerializations too, fastest first (default: only "
        "what the config says and, if that does not fit, the smallest change)",
    )
    parser.epilog = "--config.key=value changes a value of the config, e.g. --config.accumulate=8"


def main(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 0 if the config (of a sweep: anything in it) fits, else 1."""
    pod = topology.parse(args.topology)
    environment = topology.environment(pod)
    if "jax" in sys.modules:
        raise UserError("expected a process that has not imported JAX yet, got one that has: call the command instead")
    os.environ.update(environment)

    from dalle_jax.preflight import report, search
    from dalle_jax.preflight.job import Job
    from dalle_jax.train.settings import load_settings

    settings, devices = load_settings(args.config, args.overrides), tuple(topology.devices(pod))
    job = Job(settings, pod, devices, image_tokenizers=image_tokenizers())
    if args.sweep:
        results = search.sweep(job)
        print(json.dumps([_json(r) for r in results]) if args.json else report.sweep_table(results))
        return 0 if any(r.verdict.fits for r in results) else 1
    result = search.examine(job)
    change = None if result.verdict.fits else search.smallest_change(result)
    if args.json:
        print(json.dumps({**_json(result), "changes": [] if change is None else [_change(change)]}, indent=2))
    else:
        print(report.table(result, change))
    return 0 if result.verdict.fits else 1


def image_tokenizers() -> tuple:
    """Model configs of image tokenizers, of which a transformer means one if its settings name none."""
    from dalle_jax.train.settings import load_settings

    files = ("configs/dvae.py", "configs/vq.py")
    specs = [f"{file}:{variant}" for file in files for variant in configs.variants(file)]
    return tuple(load_settings(spec).model for spec in specs)


def _json(result) -> dict[str, Any]:
    """All figures of one result; bytes are of one chip, FLOPs and tokens of the whole job."""
    job, verdict, guess = result.job, result.verdict, result.estimate
    return {
        "topology": str(job.topology),
        "chips": job.topology.count,
        "mesh": dict(job.mesh.shape),
        "changed": dict(result.changed),
        "parameters": job.task.model.num_params,
        "fits": verdict.fits,
        "bytes_per_chip": {"compression": 0, **result.bytes, "total": sum(result.bytes.values())},
        "compiler_bytes_per_chip": {
            "arguments": verdict.argument_bytes,
            "temporaries": verdict.temporary_bytes,
            "code": verdict.code_bytes,
            "total": verdict.total_bytes,
        },
        "sampling": None if result.sampling is None else dataclasses.asdict(result.sampling),
        "bytes_across_replicas": dict(zip(("sent", "without_compression"), job.across_replicas, strict=True)),
        "compression_saved": 1 - job.across_replicas[0] / job.across_replicas[1],
        "chip_bytes": job.topology.chip.memory_bytes,
        "usable_bytes": job.topology.usable_bytes,
        "flops_per_sequence": job.work.model_flops,
        "executed_flops_per_sequence": job.work.executed_flops,
        "flops_per_step": job.work.model_flops * job.settings.batch_size,
        "collectives": [dataclasses.asdict(c) for c in result.collectives],
        "collectives_compiled": verdict.collectives is not None,  # else what the mesh makes necessary, by our model
        "seconds_per_step": {**guess.seconds, "total": guess.step_seconds},
        "binding": guess.binding,
        "tokens_per_second": guess.tokens_per_second,
        "days": guess.days,
        "compile_seconds": verdict.seconds,
    }


def _change(result) -> dict[str, Any]:
    figures = _json(result)
    keys = ("topology", "changed", "fits", "bytes_per_chip", "compiler_bytes_per_chip", "tokens_per_second", "days")
    return {key: figures[key] for key in keys}
