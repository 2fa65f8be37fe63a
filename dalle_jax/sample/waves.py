"""Which images are drawn together: requests cut into waves of few shapes, as large as the memory allows.

A wave is C captions with M candidates each; a request takes one place of C for every M of its candidates. Shapes come
from a ladder with few steps, so that few programs are compiled; places that nobody fills are drawn and thrown away.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax

from dalle_jax.sample.engine import Engine

SHARE = 0.8  # of the free memory that a wave may take: the rest is for decoding and ranking
MOST = {"cpu": 64, "gpu": 512, "tpu": 512}  # images a device beyond which a wave gains nothing: a step is bound by
# arithmetic at these (a processor's cache is full sooner)


@dataclasses.dataclass(frozen=True)
class Place:
    """Candidates first .. first + count - 1 of a request."""

    request: int
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One wave: `captions` x `candidates` images, of which the places ask for some."""

    captions: int
    candidates: int
    places: tuple[Place, ...]


def ladder(count: int) -> int:
    """The smallest power of four that is at least `count`: few steps, as each is a program to compile. What is drawn
    too much costs little, as long as a step's time is mostly that of reading the weights."""
    return 4 ** ((max(count, 1) - 1).bit_length() + 1 >> 1)


def plan(counts: Sequence[int], *, capacity: int, ways: int = 1) -> list[Plan]:
    """Waves of at most `capacity` images that draw `counts[i]` candidates of request i.

    ways: every wave's number of images is a multiple of it. capacity: at least `ways`.
    """
    parts = -(-max(counts) // capacity)  # of the largest request, as even as they come
    width = min(ladder(-(-max(counts) // parts)), capacity)
    places = [
        Place(request, first, min(width, count - first))
        for request, count in enumerate(counts)
        for first in range(0, count, width)
    ]
    height = min(ladder(len(places)), max(1, capacity // width))
    if (height * width) % ways:
        width = -(-width // ways) * ways  # a multiple by itself, whatever the captions
        height = min(height, max(1, capacity // width))
    return [Plan(height, width, tuple(places[i : i + height])) for i in range(0, len(places), height)]


def capacity(engine: Engine, *, guided: bool, free: int | None = None) -> tuple[int, str]:
    """Most images in a wave, and one sentence that says why.

    free: bytes of one device; default: what is free of it now.
    """
    ways, device = engine.ways, engine.mesh.devices.flat[0]
    one = engine.wave_bytes(1, 1, guided=guided)
    each = engine.wave_bytes(1, 2, guided=guided) - one  # a caption's own part counts as one image more
    free = (free_bytes(engine.mesh.local_devices[0]) if free is None else free) * engine.mesh.size
    fit = max(1, int((SHARE * free - (one - each)) // each)) // ways * ways
    most = MOST.get(device.platform, MOST["gpu"]) * ways
    images = max(ways, min(fit, most))
    told = f"{images} images a wave: {each / 1e6:.2f} MB each, {SHARE:.0%} of {free / 1e9:.1f} GB free holds {fit}"
    return images, told + (f", and more than {most} are not faster" if fit > most else "")


def free_bytes(device: jax.Device) -> int:
    """Memory of a device that is not in use; of the machine, where the device is its processor."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
