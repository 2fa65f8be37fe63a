"""The chips: memory, arithmetic, and how fast each receives from its neighbors.

All figures are the makers', for dense arithmetic without sparsity; `roofline.py` knows what real programs reach of
them. Sources:

    TPU   Google Cloud's "System architecture" pages of v4, v5e, v5p and v6e: peak bf16, HBM capacity and bandwidth,
          inter-chip interconnect. The interconnect's figure counts both directions of all links of a chip; half of it
          is what a chip can receive. (v4: 6 links x 50 GB/s, v5p: 6 x 100, v5e: 4 x 50, v6e: 4 x 100 a direction.)
    GPU   NVIDIA's data sheets of V100 SXM2, A100 SXM4, H100 SXM5 and H200 SXM. Inside a host NVLink, one direction
          (150, 300, 450, 450 GB/s). Outside, the network cards of NVIDIA's own 8-GPU machine shared by its GPUs:
          DGX-1 4 x 100 Gb/s, DGX A100 8 x 200 Gb/s, DGX H100 and H200 8 x 400 Gb/s.

Memory is what a driver reports as usable by programs: for GPUs the size in their device description, for TPUs what the
compiler itself lays its programs out in.
"""

import dataclasses
from collections.abc import Mapping

from dalle_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class GpuCore:
    """Properties of a GPU that XLA's compiler asks for besides its memory, as CUDA's device query prints them."""

    product: str
    compute_capability: tuple[int, int]
    cores: int
    lanes_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # opted in
    l2_bytes: int
    clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip, which is one JAX device.

    platform: 'tpu' or 'gpu'. memory_bytes: of device memory. peak_flops: multiply-adds count two; by 'fp32', 'bf16'
    or, where there is such arithmetic, 'fp16'. 'fp32' is what a float32 matrix product really runs as by default (one
    bf16 pass on TPU, TF32 on A100 and later). memory_bandwidth, inside_bandwidth, outside_bandwidth: bytes per second
    that a chip reads, receives inside its slice (TPU) or NVLink domain (GPU), and receives from others, 0 without
    others. usable_share: of memory_bytes that one program may take. core: of an NVIDIA GPU.
    """

    name: str
    platform: str
    memory_bytes: int
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    inside_bandwidth: float
    outside_bandwidth: float = 0.0
    usable_share: float = 1.0
    core: GpuCore | None = None


# A GPU process also holds the CUDA context, NCCL's and cuDNN's buffers: about 1.5 GB to 5 GB are not for the program.
GPU_USABLE = 0.92


def _tpu(name, gib, bf16, memory, interconnect) -> Chip:
    return Chip(name, "tpu", int(gib * GIB), {"bf16": bf16, "fp32": bf16}, memory, interconnect)


def _gpu(name, core, size, peaks, memory, inside, outside) -> Chip:
    return Chip(name, "gpu", size, peaks, memory, inside, outside, usable_share=GPU_USABLE, core=core)


# Volta has no bf16 arithmetic: the compiler widens it to float32, which runs outside the tensor cores.
_VOLTA = {"fp16": 125e12, "bf16": 15.7e12, "fp32": 15.7e12}
_AMPERE = {"fp16": 312e12, "bf16": 312e12, "fp32": 156e12}
_HOPPER = {"fp16": 989e12, "bf16": 989e12, "fp32": 494e12}

_V100 = GpuCore("Tesla V100-SXM2", (7, 0), 80, 64, 96 << 10, 96 << 10, 6 << 20, 1.53)
_A100 = GpuCore("NVIDIA A100-SXM4", (8, 0), 108, 64, 164 << 10, 163 << 10, 40 << 20, 1.41)
_H100 = GpuCore("NVIDIA H100", (9, 0), 132, 128, 228 << 10, 227 << 10, 50 << 20, 1.98)
_H200 = dataclasses.replace(_H100, product="NVIDIA H200")

_CHIPS = (
    _tpu("v4", 30.75, 275e12, 1.228e12, 300e9),
    _tpu("v5e", 15.75, 197e12, 0.819e12, 200e9),
    _tpu("v5p", 95.74, 459e12, 2.765e12, 600e9),
    _tpu("v6e", 31.25, 918e12, 1.638e12, 400e9),
    _gpu("v100-16", _V100, 16_935_682_048, _VOLTA, 0.898e12, 150e9, 6.25e9),
    _gpu("v100-32", _V100, 34_079_899_648, _VOLTA, 0.898e12, 150e9, 6.25e9),
    _gpu("a100-40", _A100, 42_298_834_944, _AMPERE, 1.555e12, 300e9, 25e9),
    _gpu("a100-80", _A100, 84_974_239_744, _AMPERE, 2.039e12, 300e9, 25e9),
    _gpu("h100", _H100, 84_942_979_072, _HOPPER, 3.352e12, 450e9, 50e9),
    _gpu("h200", _H200, 150_754_820_096, _HOPPER, 4.8e12, 450e9, 50e9),
)
CHIPS = {platform: {c.name: c for c in _CHIPS if c.platform == platform} for platform in ("tpu", "gpu")}


def gpu_target(chip: Chip) -> str:
    """XLA's GpuTargetConfig of an NVIDIA GPU as protobuf text, which lets it compile without one.

    The block and thread limits are those of every CUDA GPU since Kepler, the register file that of every one since
    Volta. CUDA and cuDNN versions are lower bounds of what JAX installs.
    """
    core = chip.core
    assert core is not None
    major, minor = core.compute_capability
    # Hopper's matrix instructions exist only in its 'a' variant of the instruction set.
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {core.shared_memory_per_core}
  shared_memory_per_block_optin: {core.shared_memory_per_block}
  threads_per_core_limit: 2048
  core_count: {core.cores}
  fpus_per_core: {core.lanes_per_core}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: {core.l2_bytes}
  clock_rate_ghz: {core.clock_ghz}
  device_memory_size: {chip.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
  name: "{core.product}"
  device_vendor: "NVIDIA Corporation"
}}
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
platform_name: "CUDA"
device_description_str: "{core.product}"
"""


def find_chip(platform: str, name: str) -> Chip:
    """The chip of this name. Raises UserError for one that is not in the table."""
    if platform not in CHIPS:
        raise UserError(f"expected a topology that begins with tpu: or gpu:, got {platform!r}: see `--help`")
    if name not in CHIPS[platform]:
        raise UserError(f"expected one of {', '.join(CHIPS[platform])} after {platform}:, got {name!r}")
    return CHIPS[platform][name]
