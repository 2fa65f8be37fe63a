"""Batches: the candidates of requests cut into few shapes, as large as the memory allows.

A batch has P prompts with M candidates each; a request takes one slot of P for every M of its candidates. Both come
from a few bucket sizes, so that few programs are compiled; slots that no request needs are drawn and dropped.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

MEMORY_SHARE = 0.8  # of the free memory that a batch may take; the rest is for decoding and ranking
# Images per device beyond which a batch gains nothing: a step is bound by arithmetic, or a processor's cache is full.
MAX_IMAGES = {"cpu": 64, "gpu": 512, "tpu": 512}


class Capacity(NamedTuple):
    """The maximum number of images in a batch, and a sentence that says why."""

    images: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Slot:
    """Candidates first .. first + count - 1 of a request."""

    request: int
    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A batch of `prompts` x `candidates` images; its first prompts are taken by the slots."""

    prompts: int
    candidates: int
    slots: tuple[Slot, ...]


def bucket(count: int) -> int:
    """The smallest bucket size, a power of four, that holds `count`.

    Bucket sizes are few because each is compiled separately. Padding is cheap while a step is bound by reading the
    weights.
    """
    return 4 ** ((max(count, 1) - 1).bit_length() + 1 >> 1)


def plan(counts: Mapping[int, int], *, capacity: int, multiple: int = 1) -> list[Plan]:
    """Batches of at most `capacity` images that draw `counts[i]` candidates of request i.

    multiple: a factor of the number of images of every batch. capacity: at least `multiple`.
    """
    largest = max(counts.values())
    parts = -(-largest // capacity)  # of the largest request, as even as possible
    width = min(bucket(-(-largest // parts)), capacity)
    slots = [
        Slot(request, first, min(width, count - first))
        for request, count in counts.items()
        for first in range(0, count, width)
    ]
    height = min(bucket(len(slots)), max(1, capacity // width))
    if (height * width) % multiple:
        width = -(-width // multiple) * multiple
        height = min(height, max(1, capacity // width))
    return [Plan(height, width, tuple(slots[i : i + height])) for i in range(0, len(slots), height)]


def capacity(*, image_bytes: int, prompt_bytes: int, mesh: Mesh, multiple: int) -> Capacity:
    """The largest batch that fits the free memory of the mesh and is still worth it.

    image_bytes: of one candidate on all devices together. prompt_bytes: of what all candidates of a prompt share.
    """
    free = free_bytes(mesh.local_devices[0]) * mesh.size
    fit = max(1, int((MEMORY_SHARE * free - prompt_bytes) // image_bytes)) // multiple * multiple
    useful = MAX_IMAGES.get(mesh.devices.flat[0].platform, MAX_IMAGES["gpu"]) * multiple
    images = max(multiple, min(fit, useful))
    reason = f"{images} images per batch: {image_bytes / 1e6:.2f} MB each, {MEMORY_SHARE:.0%} of {free / 1e9:.1f} GB "
    reason += f"free holds {fit}"
    return Capacity(images, reason + (f", and more than {useful} are not faster" if fit > useful else ""))


def free_bytes(device: jax.Device) -> int:
    """Free memory of a device; for a processor, its share of the machine's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
