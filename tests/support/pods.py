"""Jobs of preflight on the eight emulated devices, which stand for GPUs or TPUs."""

import jax

from dalle_jax.preflight import hardware
from dalle_jax.preflight.job import Job
from dalle_jax.preflight.topology import Topology
from tests.support.demo_settings import demo_settings

VALUES = {"batch_size": 16, "run.steps": 100, "model.num_layers": 2, "run.mesh.fsdp": 4, "run.mesh.replica": 2}


def emulated(chip="h100", shape=(1, 8), platform="gpu"):
    """A job of the demo transformer and dVAE."""
    pod, devices = Topology(hardware.find_chip(platform, chip), shape), tuple(jax.devices())
    dvae = demo_settings("dvae", {}).model
    return Job(demo_settings("transformer", VALUES), pod, devices, image_tokenizers=(dvae,))
