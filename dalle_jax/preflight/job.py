"""One training job on one topology, abstractly: task, mesh and the arguments of its step, nothing allocated.

Step and shardings are those of the training (`train/step.py`); only the arrays are missing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle_jax import model_dir, sharding
from dalle_jax.data.sources import is_tokens
from dalle_jax.errors import UserError
from dalle_jax.mesh import Shape, demand, possible
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import Model, build, image_tokenizer, lpips
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.layers import compute_dtype
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight import flops
from dalle_jax.preflight.topology import Topology
from dalle_jax.train import run
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer import powersgd
from dalle_jax.train.settings import TrainSettings
from dalle_jax.train.step import State, TrainStep

MODELED = (*image_tokenizer.NAMES, "transformer")  # names of models whose bytes on a device are known


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings of a training on a topology.

    devices: the topology's, slice after slice. image_tokenizers: configs of those that a transformer may mean whose
    settings name none; the first that fits it is taken.
    """

    settings: TrainSettings
    topology: Topology
    devices: tuple[Any, ...]
    image_tokenizers: tuple[Any, ...] = (DVAEConfig(precision="bf16"),)

    @functools.cached_property
    def image_tokenizer(self) -> Model | None:
        """The frozen image tokenizer of a transformer."""
        model = self.settings.model
        if not isinstance(model, TransformerConfig):
            return None
        wanted = model.grid, model.image_vocab, self.settings.data.image_size
        return _image_tokenizer(self.settings.frozen["image_tokenizer"], self.image_tokenizers, wanted)

    @property
    def has_image_tokens(self) -> bool:
        """Whether the transformer trains on image tokens made before, so that no step needs the image tokenizer."""
        train = self.settings.run.data.train
        return self.image_tokenizer is not None and train is not None and is_tokens(train)

    @functools.cached_property
    def task(self) -> Task:
        """The task of the training. Raises UserError for impossible sizes, or a model whose bytes are not known."""
        if self.settings.name not in MODELED:
            raise UserError(
                f"preflight knows {', '.join(MODELED[:-1])} and {MODELED[-1]} configs, got a {self.settings.name}: "
                "train it at once, it is small"
            )
        chip = self.topology.chip
        capability = chip.core.compute_capability if chip.core else None
        run.check_machine(self.settings, machine=str(self.topology), platform=chip.platform, capability=capability)
        tokenizer = self.image_tokenizer
        frozen = {} if tokenizer is None else {"image_tokenizer": ModelDir({}, tokenizer, tokenizer.abstract)}
        if self.settings.frozen.get("lpips"):
            network = lpips.model(lpips.LPIPSConfig())
            frozen["lpips"] = ModelDir({}, network, network.abstract)
        return build_task(self.settings, frozen)

    @functools.cached_property
    def work(self) -> flops.Work:
        """The computation of one example."""
        if self.image_tokenizer is None:
            example = {name: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for name, a in self.batch.items()}
            key, step = jax.random.key(0), jnp.zeros([], jnp.int32)
            memory = jax.eval_shape(self.task.memory, key) if self.task.memory else {}

            def loss(params, given):
                batch, memory, frozen = given
                return self.task.measure(params, frozen, batch, key=key, step=step, memory=memory)[0]

            alone = not self.task.frozen and self.task.onset is None  # no LPIPS, no adversary
            return flops.traced_work(loss, self.task.model, (example, memory, self.task.frozen), trained=alone)
        return flops.transformer_work(self.task.model.config, None if self.has_image_tokens else self.image_tokenizer)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh that the training would take. Raises UserError for one that does not fit the chips or the batch."""
        return run.mesh_for(self.settings, self.task, devices=self.devices)

    @property
    def layouts(self) -> list[Shape]:
        """Shapes of all meshes that the training would accept on these chips, the best first."""
        model, settings = self.task.model, self.settings
        ask = demand(model.abstract, model.axes, batch_size=settings.batch_size, accumulate=settings.accumulate)
        return possible(self.topology.count, self.topology.slice_size, unfit=ask)

    @functools.cached_property
    def step(self) -> TrainStep:
        """The step of the training."""
        step = run.step_for(self.settings, self.task, self.mesh)
        return dataclasses.replace(step, offload_ema=False) if self._without_host_memory else step

    @property
    def _without_host_memory(self) -> bool:
        """Whether host memory cannot be compiled: JAX's devices of a GPU topology have no memory spaces."""
        return self.topology.chip.platform == "gpu"

    @property
    def average_bytes_taken_off(self) -> int:
        """Bytes of a moving average that the host will hold, though the program is compiled with it on the chip."""
        taken_off = self._without_host_memory and self.settings.run.offload_ema
        return shard_bytes(self.state["ema"]) if taken_off else 0

    @property
    def across_replicas(self) -> tuple[int, int]:
        """Bytes of gradients that a chip averages with other replicas in a step, and those without compression."""
        model, cut = self.task.model, self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        compression = self.settings.compression
        item = compute_dtype(self.settings.model.precision)(0).dtype.itemsize
        if not compression.rank:
            return (model.num_params * item // cut,) * 2
        found = powersgd.layouts(model.abstract, model.axes, compression=compression, mesh=self.mesh)
        sent, instead = powersgd.sent_numbers(found)
        rest = 4 * (model.num_params // cut - instead)
        return sent * (4 if compression.format == "fp32" else 2) + rest, instead * item + rest

    @property
    def state(self) -> State:
        """The training state as jax.ShapeDtypeStruct with shardings."""
        settings, model = self.settings, self.settings.model
        if isinstance(model, TransformerConfig):
            model = dataclasses.replace(model, remat="none")  # of no effect on the state
        parts = settings.optimizer, settings.storage, settings.compression, settings.run.steps, settings.run.offload_ema
        decides = model, *parts, self.mesh
        if decides not in self._states:
            self._states[decides] = self.step.abstract
        return self._states[decides]

    @functools.cached_property
    def _states(self) -> dict[Any, State]:
        """States of this job and of all that `changed` makes of it, by what decides them; a search needs hundreds."""
        return {}

    @functools.cached_property
    def frozen(self) -> Any:
        """Parameters of frozen models, whole on every chip as the loop puts them where anything asks for them."""
        everywhere = sharding.replicated(self.mesh)
        frozen = run.frozen_in_use(self.settings, self.task)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), frozen)

    @functools.cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as the pipeline makes it, cut along every axis that shares batches."""
        place = sharding.batch_sharding(self.mesh)
        size, model, image_size = self.settings.batch_size, self.settings.model, self.settings.data.image_size
        shapes: dict[str, tuple[int, ...]] = {"image": (size, image_size, image_size, 3)}
        if isinstance(model, TransformerConfig):
            shapes = {"image_tokens": (size, model.grid**2)} if self.has_image_tokens else shapes
            shapes["text"] = size, model.text_len
        dtypes = {"image": jnp.uint8, "image_tokens": jnp.int32, "text": jnp.int32}
        return {name: jax.ShapeDtypeStruct(s, dtypes[name], sharding=place) for name, s in shapes.items()}

    @property
    def sequences(self) -> int:
        """Examples that one chip has at once: of one microbatch, replicated along tensor."""
        return self.settings.batch_size // (sharding.batch_ways(self.mesh) * self.settings.accumulate)

    @property
    def first_devices(self) -> list[Any]:
        """Devices of the first process: of a TPU slice those of a host, of GPUs one, as the launchers start them."""
        first = self.devices[0]
        if self.topology.chip.platform == "gpu":
            return [first]
        return [device for device in self.devices if device.process_index == first.process_index]

    @property
    def slices(self) -> list[int]:
        """Number of the slice or NVLink domain of each device, in the order of the mesh."""
        place = {device: index // self.topology.slice_size for index, device in enumerate(self.devices)}
        return [place[device] for device in self.mesh.devices.flat]

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered for the topology's platform."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.step.update.lower(self.state, self.frozen, self.batch, key)

    def changed(self, values: Mapping[str, Any]) -> "Job":
        """The same job with other values of config keys, for example {'model.remat': 'full'}."""
        job = dataclasses.replace(self, settings=self.settings.changed(values))
        if not any(key.startswith(("name", "model.", "objective.", "data.", "frozen.")) for key in values):
            vars(job).update(task=self.task)  # the same, and slow to build
        vars(job).update(_states=self._states)
        return job


@functools.cache
def _image_tokenizer(folder: str | None, known: tuple[Any, ...], wanted: tuple[int, int, int]) -> Model:
    """The definition of the image tokenizer in a folder or, without a folder, of the first known one that fits.

    wanted: grid, vocabulary, and pixels per side. One object for all jobs of a search, as it is slow to build.
    """
    if folder:
        config = model_dir.read_config(folder)
        found = [build(config["name"], config["model"])]
    else:
        found = [image_tokenizer.build(config) for config in known]
    for model in found:
        if (model.config.grid, model.config.vocab, model.config.image_size) == wanted:
            return model
    raise UserError(
        f"expected an image tokenizer with grid, vocabulary and pixels per side of {wanted}, got none in "
        f"{folder or 'configs/'}: name its folder as --config.frozen.image_tokenizer=DIR or change config.model"
    )


def shard_bytes(tree: Any) -> int:
    """Bytes that one chip holds of a tree of jax.ShapeDtypeStruct with shardings.

    Padding is not counted, nor what lies in its host's memory.
    """
    here = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != sharding.HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in here)
