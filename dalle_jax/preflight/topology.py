"""From `tpu:v5p:8x8x16` or `gpu:h100:128x8` to devices that can be compiled for, though none of them is here.

Compiling for another platform needs that platform's compiler (libtpu, or JAX's CUDA plugin) but no chip. The variables
of `environment` must be set before JAX is imported.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re
import shutil
import subprocess
from typing import Any

from dalle_jax.errors import UserError
from dalle_jax.preflight.hardware import Chip, find_chip, gpu_target

MAX_CHIPS = 65_536
FORM = "tpu:CHIP:XxYxZ or gpu:CHIP:HOSTSxGPUS"

# Modules of a platform's compiler, what it is, the extra that installs it, a note.
COMPILERS = {
    "tpu": (["libtpu"], "libtpu", "tpu", "no TPU is needed"),
    "gpu": (
        ["jax_cuda12_plugin", "jax_cuda13_plugin"],
        "JAX's CUDA plugin",
        "preflight-gpu",
        "5 GB; no GPU is needed",
    ),
}
NO_HOST = {
    # This host is no TPU machine: the cloud's metadata service is not asked which one it is, any answer does, and there
    # is no chip to protect from a second process.
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    },
    # With a platform named, JAX does not load the plugins of others; a GPU that is here must not be touched.
    "gpu": {"JAX_PLATFORMS": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""},
}
LAUNCH_FLAGS = pathlib.Path(__file__).resolve().parents[2] / "launch" / "xla_flags.sh"
FLAGS = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}  # where that file puts them
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}  # compilers' own warnings


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    shape: of a TPU slice in chips, (8, 8, 16); of a GPU cluster (hosts, GPUs of a host). A fast interconnect joins the
    chips of a TPU slice, or those of an NVLink domain, the GPUs of a host.
    """

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.platform}:{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """Chips, which is JAX devices."""
        return math.prod(self.shape)

    @property
    def slice_size(self) -> int:
        """Chips of one slice or NVLink domain; chip number i is in number i // slice_size."""
        return self.count if self.chip.platform == "tpu" else self.shape[1]

    @property
    def slice_noun(self) -> str:
        return "slice" if self.chip.platform == "tpu" else "NVLink domain"

    @property
    def usable_bytes(self) -> int:
        """Device memory of a chip that a program may take."""
        return int(self.chip.memory_bytes * self.chip.usable_share)


def parse(text: str) -> Topology:
    """The topology that this text names.

    Raises:
      UserError: another form, an unknown chip, or a shape with the wrong number of dimensions or too many chips.
    """
    match = re.fullmatch(r"(\w+):([\w-]+):(\d+(?:x\d+)*)", text)
    if not match:
        raise UserError(f"expected --topology {FORM}, such as tpu:v5p:8x8x16 or gpu:h100:128x8, got {text!r}")
    chip = find_chip(match[1], match[2])
    shape = tuple(map(int, match[3].split("x")))
    wanted = 2 if chip.platform == "gpu" or chip.name in ("v5e", "v6e") else 3
    if len(shape) != wanted or 0 in shape:
        what = "HOSTSxGPUS" if chip.platform == "gpu" else f"{wanted} positive sizes joined by x"
        raise UserError(f"expected {what} after {chip.platform}:{chip.name}:, got {match[3]!r}")
    if (count := math.prod(shape)) > MAX_CHIPS:
        raise UserError(f"expected at most {MAX_CHIPS:,} chips, got {count:,} in {text}: name a smaller pod")
    return Topology(chip, shape)


def environment(topology: Topology) -> dict[str, str]:
    """Variables that must be set before JAX is imported to compile for this topology.

    The launchers' flags are among them, as they decide how a program is scheduled and so how much memory it needs.
    Flags that are set already win. Outside of a checkout, where there are no launchers, there are none.

    Raises:
      UserError: the platform's compiler is not installed.
    """
    platform = topology.chip.platform
    modules, what, extra, note = COMPILERS[platform]
    if not any(map(importlib.util.find_spec, modules)):
        raise UserError(
            f"expected {what} to compile for {topology}, got none installed: pip install -e '.[{extra}]' ({note})"
        )
    return {**NO_HOST[platform], **QUIET, **_launch_flags(platform)}


def _launch_flags(platform: str) -> dict[str, str]:
    if not LAUNCH_FLAGS.is_file() or shutil.which("bash") is None:
        return {}
    name = FLAGS[platform]
    words = ["bash", "-c", f'source "$0" "$1" && printf %s "${name}"', str(LAUNCH_FLAGS), platform]
    return {name: subprocess.run(words, check=True, capture_output=True, text=True).stdout}


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, slice after slice.

    Raises:
      UserError: a slice of a shape that the compiler does not know.
    """
    from jax.experimental import topologies  # after `environment` has been set

    chip = topology.chip
    shape = "x".join(map(str, topology.shape))
    try:
        if chip.platform == "tpu":
            # The two cores of a v4 or v5p chip act as one device, as they do on a real slice.
            kwargs = {"chip_config_name": "megacore"} if chip.name in ("v4", "v5p") else {}
            found = topologies.get_topology_desc(f"{chip.name}:{shape}", platform="tpu", **kwargs).devices
        else:
            found = topologies.get_topology_desc(
                chip.name, platform="cuda", topology=f"1x{shape}", target_config=gpu_target(chip)
            ).devices
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"expected a topology that its compiler knows, got {topology} ({first}): try another"
        ) from error
    if len(found) != topology.count:
        raise UserError(f"expected {topology.count} devices in {topology}, got {len(found)}: update libtpu")
    return list(found)
