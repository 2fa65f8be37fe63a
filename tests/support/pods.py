"""Jobs of preflight on the eight emulated devices, which stand for GPUs or TPUs."""

import jax

from dalle_jax import config as configs
from dalle_jax.preflight import hardware
from dalle_jax.preflight.job import Job
from dalle_jax.preflight.topology import Topology

WORDS = ("batch_size=16", "steps=100", "model.num_layers=2", "mesh.fsdp=4", "mesh.replica=2")


def emulated(chip="h100", shape=(1, 8), platform="gpu"):
    """A job of the demo transformer."""
    config = configs.load("configs/transformer.py:demo", [f"--config.{word}" for word in WORDS])
    return Job(config, Topology(hardware.find_chip(platform, chip), shape), tuple(jax.devices()))
