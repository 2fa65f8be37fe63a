"""One training job on one topology, abstractly: task, mesh and the arguments of its update, nothing allocated.

The update is `train/step.py`'s own, the state's places are those it trains with; only the arrays are missing.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dalle_jax import config as configs
from dalle_jax import model_dir, sharding
from dalle_jax.data.sources import is_tokens
from dalle_jax.errors import UserError
from dalle_jax.mesh import Shape, demand, possible
from dalle_jax.models import Model, build
from dalle_jax.models.attention import kernels
from dalle_jax.models.layers import compute_dtype
from dalle_jax.preflight import flops
from dalle_jax.preflight.hardware import compute_capability
from dalle_jax.preflight.topology import Topology
from dalle_jax.train import run
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.objectives.transformer import transformer_task
from dalle_jax.train.optimizer import powersgd
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.step import State, TrainStep

DVAES = ("configs/dvae.py:paper", "configs/dvae.py:emoji", "configs/dvae.py:demo")


@dataclasses.dataclass(frozen=True)
class Job:
    """A config on a topology. `devices` are the topology's, slice after slice."""

    config: ml_collections.ConfigDict
    topology: Topology
    devices: tuple[Any, ...]

    @functools.cached_property
    def helper(self) -> Model | None:
        """The frozen dVAE of a transformer."""
        if self.config.name != "transformer":
            return None
        model = self.config.model
        return _helper(self.config.dvae, (model.grid, model.image_vocab, self.config.data.image_size))

    @property
    def has_codes(self) -> bool:
        """Does the transformer train on codes made before, so that no update asks for the dVAE?"""
        return self.helper is not None and is_tokens(self.config.data.train)

    @functools.cached_property
    def task(self) -> Task:
        """Raises UserError for impossible sizes, or a model whose bytes nobody has modelled."""
        if self.config.name == "clip":
            raise UserError("preflight knows dvae and transformer configs, got a clip: train it at once, it is small")
        if self.config.precision.startswith("fp16") and self.topology.chip.platform == "tpu":
            raise UserError(
                f"expected a GPU for config.precision = {self.config.precision}, got {self.topology}: TPUs have no "
                "float16 arithmetic, set --config.precision=bf16"
            )
        if self.config.name == "transformer":
            chip = self.topology.chip
            kernels.check_machine(
                self.config.model.attention,
                machine=str(self.topology),
                platform=chip.platform,
                capability=compute_capability(chip),
            )
        if self.helper is None:
            return build_task(self.config)
        try:
            return transformer_task(self.config, self.helper, self.helper.abstract)
        except (TypeError, ValueError) as error:
            raise UserError(f"expected a possible transformer in config.model, got one where {error}") from error

    @functools.cached_property
    def work(self) -> flops.Work:
        """What one example computes."""
        if self.helper is None:
            return flops.traced_work(self.loss, self.task.model, self.example)
        return flops.transformer_work(self.task.model.config, None if self.has_codes else self.helper)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh that the training would take. Raises UserError for one that does not fit the chips or the batch, and
        for what cannot be compiled without the machine."""
        run.check_values(self.config)
        return run.mesh_for(self.config, self.task.model, devices=self.devices)

    @property
    def layouts(self) -> list[Shape]:
        """Shapes of all meshes that the training would accept on these chips, the best first."""
        model, config = self.task.model, self.config
        ask = demand(model.abstract, model.axes, batch_size=config.batch_size, accumulate=config.accumulate)
        return possible(self.topology.count, self.topology.slice_size, unfit=ask)

    @functools.cached_property
    def step(self) -> TrainStep:
        """The update that the training would make."""
        step = run.step_for(self.config, self.task, self.mesh)
        if self._without_host_memory:
            step = dataclasses.replace(step, storage=dataclasses.replace(step.storage, offload_ema=False))
        return step

    @property
    def _without_host_memory(self) -> bool:
        """JAX's devices of a GPU topology have no memory spaces: what a host keeps cannot be compiled as such."""
        return self.topology.chip.platform == "gpu"

    @property
    def average_bytes_taken_off(self) -> int:
        """Bytes of a moving average that the host will hold, though the program is compiled with it on the chip."""
        taken_off = self._without_host_memory and self.config.storage.offload_ema
        return shard_bytes(self.state["ema"]) if taken_off else 0

    @property
    def _compression(self) -> Compression:
        return Compression(**self.config.compression)

    @property
    def across_replicas(self) -> tuple[int, int]:
        """Bytes of gradients that a chip averages with other replicas in an update, and those without compression."""
        model, cut = self.task.model, self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        item = compute_dtype(self.config.model.precision)(0).dtype.itemsize
        if not self._compression.rank:
            return (model.num_params * item // cut,) * 2
        found = powersgd.layouts(model.abstract, model.axes, compression=self._compression, mesh=self.mesh)
        sent, instead = powersgd.sent_numbers(found)
        rest = 4 * (model.num_params // cut - instead)
        return sent * (4 if self._compression.format == "fp32" else 2) + rest, instead * item + rest

    @property
    def state(self) -> State:
        """The training state as jax.ShapeDtypeStruct with shardings."""
        config = self.config.to_dict()
        model = {key: value for key, value in config["model"].items() if key != "remat"}
        parts = model, config["optimizer"], config["storage"], config["compression"], config["steps"]
        decides = config["name"], json.dumps(parts, sort_keys=True), self.mesh
        if decides not in self._states:
            self._states[decides] = self.step.abstract
        return self._states[decides]

    @functools.cached_property
    def _states(self) -> dict[Any, State]:
        """Of this job and all that `changed` makes of it, by what decides them: a search asks for hundreds."""
        return {}

    @functools.cached_property
    def frozen(self) -> Any:
        """The helper's parameters, whole on every chip as the loop puts them where anything asks for them."""
        everywhere = sharding.replicated(self.mesh)
        frozen = self.task.frozen if run.reads_pictures(self.config) else {}
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), frozen)

    @functools.cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as the pipeline makes it, cut along every axis that shares batches."""
        place = sharding.batch_sharding(self.mesh)
        size, side = self.config.batch_size, self.config.data.image_size
        arrays = {"image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8, sharding=place)}
        if self.has_codes:
            arrays = {
                "image_tokens": jax.ShapeDtypeStruct((size, self.config.model.grid**2), jnp.int32, sharding=place)
            }
        if self.helper is not None:
            text_len = self.config.model.text_len
            arrays["text"] = jax.ShapeDtypeStruct((size, text_len), jnp.int32, sharding=place)
        return arrays

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of one, without a place."""
        return {name: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for name, a in self.batch.items()}

    def loss(self, params: Any, example: Any) -> jax.Array:
        """The task's loss where it has no frozen helper, to be traced."""
        return self.task.loss(params, {}, example, key=jax.random.key(0), step=jnp.zeros([], jnp.int32))[0]

    @property
    def sequences(self) -> int:
        """Examples that one chip has at once: of one microbatch, replicated along tensor."""
        return self.config.batch_size // (sharding.batch_ways(self.mesh) * self.config.accumulate)

    @property
    def slices(self) -> list[int]:
        """Number of the slice or NVLink domain of each device, in the order of the mesh."""
        place = {device: index // self.topology.slice_size for index, device in enumerate(self.devices)}
        return [place[device] for device in self.mesh.devices.flat]

    def lower(self) -> jax.stages.Lowered:
        """The real update, lowered for the topology's platform."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.step.update.lower(self.state, self.frozen, self.batch, key)

    def changed(self, values: Mapping[str, Any]) -> "Job":
        """The same job with other values of config keys, {'model.remat': 'full'}."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.update_from_flattened_dict(dict(values))
        job = Job(config.lock(), self.topology, self.devices)
        if not any(key.startswith(("name", "model.", "objective.", "data.", "dvae")) for key in values):
            vars(job).update(task=self.task)  # the same, and slow to build
        vars(job).update(_states=self._states)
        return job


@functools.cache
def _helper(dvae: str, wanted: tuple[int, int, int]) -> Model:
    """The definition of the dVAE in config.dvae, or of the first of DVAES that fits the transformer.

    wanted: grid, codes, and pixels of a side. One object for all jobs of a search, as it is slow to build.
    """
    if dvae:
        found = [build("dvae", model_dir.read_config(dvae)["model"])]
    else:
        found = [build("dvae", configs.load(name).model) for name in DVAES]
    for model in found:
        if (model.config.grid, model.config.vocab, model.config.image_size) == wanted:
            return model
    raise UserError(
        f"expected a dVAE with grid, codes and pixels per side of {wanted}, got none in "
        f"{dvae or 'configs/dvae.py'}: name its folder as --config.dvae=DIR or change config.model"
    )


def shard_bytes(tree: Any) -> int:
    """Bytes that one chip holds of a tree of jax.ShapeDtypeStruct with shardings, without padding and without what
    lies in its host's memory."""
    here = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != sharding.HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in here)
