"""One update: loss, gradient, accumulation over microbatches, optimizer, moving average, and what was measured.

The state is a nested dict of arrays:

    params      the model's parameters            opt_state   the optimizer's
    ema         their moving average              step        int32, updates attempted so far
    skipped     int32, updates left out because the loss or the gradient was not finite
    scales      of float16 gradients (`scaling.py`), where the model's precision has any
    error       what compression has left out so far (`powersgd.py`), where gradients are compressed

Everything random in update number t comes from fold_in(key, t), so a resumed run repeats it. `jax.jit` of training
lives here and nowhere else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dalle_jax import sharding
from dalle_jax.train.objectives.task import Batch, Metrics, Task
from dalle_jax.train.optimizer import build as optimizers
from dalle_jax.train.optimizer import loss_scale, moments, powersgd

State = dict[str, Any]
Update = Callable[[State, Any, Batch, jax.Array], tuple[State, Metrics]]
ROUNDING = 2**31 - 1  # folded into an update's key for rounding, a number that no microbatch has
REPLICAS, LEFT_OUT = ROUNDING - 1, ROUNDING - 2  # and for keys of replicas, and for rounding what they leave out
UNCOMPRESSED = powersgd.Compression()
# The update's own, by platform. XLA's CPU backend otherwise drops the barriers that keep the backward pass from
# computing its rematerialized layers all at once; outside a loop that needs as much memory as keeping everything.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the state is kept between updates; what an update computes stays float32 or the model's `precision`.

    params: dtype of the hidden matrices, 'fp32' or 'bf16', rounded at random after every update (`moments.py`). Then
      their gradients are bfloat16 too; the moving average, embeddings, heads, gains and biases stay float32.
    offload_ema: the moving average lives in the hosts' memory and passes through the device in every update, one
      stacked layer at a time.
    """

    params: str = "fp32"
    offload_ema: bool = False

    def __post_init__(self):
        moments.dtype(self.params, key="config.storage.params")


def _fresh(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    key: jax.Array,
    storage: Storage,
    scales: loss_scale.Scaling | None,
    compressor: powersgd.PowerSGD | None,
) -> State:
    params = task.model.init(key)
    kept = moments.dtype(storage.params, key="storage.params")
    is_matrix = optimizers.hidden_mask(task.model.axes)
    return {
        "params": jax.tree.map(lambda p, matrix: p.astype(kept) if matrix else p, params, is_matrix),
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "step": jnp.zeros([], jnp.int32),
        "skipped": jnp.zeros([], jnp.int32),
        **({"scales": scales.init()} if scales else {}),
        **({"error": compressor.fresh()} if compressor else {}),
    }


def _parts(
    task: Task, mesh: Mesh, compression: powersgd.Compression
) -> tuple[loss_scale.Scaling | None, powersgd.PowerSGD | None]:
    """What moves the scales of float16 gradients, and what compresses gradients; None where there is nothing to do.

    Compressed gradients are those of each replica's own loss, the mean over its part of the batch.
    """
    if not compression.rank:
        return loss_scale.of(task.model, replicas=sharding.batch_ways(mesh)), None
    compressor = powersgd.PowerSGD(task.model.abstract, task.model.axes, compression=compression, mesh=mesh)
    return loss_scale.of(task.model, replicas=sharding.batch_ways(mesh) // compressor.replicas), compressor


def abstract_state(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mesh: Mesh,
    storage: Storage = Storage(),
    compression: powersgd.Compression = UNCOMPRESSED,
) -> State:
    """The state as jax.ShapeDtypeStruct with shardings: nothing is allocated."""
    parts = _parts(task, mesh, compression)
    shapes = jax.eval_shape(lambda key: _fresh(task, optimizer, key, storage, *parts), jax.random.key(0))
    params = sharding.shardings(task.model.abstract, task.model.axes, mesh)
    places = {
        "params": params,
        "ema": params,
        "opt_state": sharding.like_params(shapes["opt_state"], params, mesh),
        "step": sharding.replicated(mesh),
        "skipped": sharding.replicated(mesh),
    }
    if "scales" in shapes:
        places["scales"] = jax.tree.map(lambda _: sharding.replicated(mesh), shapes["scales"])
    if "error" in shapes:
        places["error"] = parts[1].places
    if storage.offload_ema:
        places["ema"] = jax.tree.map(sharding.on_host, places["ema"])
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def init_state(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    key: jax.Array,
    mesh: Mesh,
    storage: Storage = Storage(),
    compression: powersgd.Compression = UNCOMPRESSED,
) -> State:
    """A fresh state, built in place on the mesh: no array is ever whole on one device unless it is so small."""
    abstract = abstract_state(task, optimizer, mesh=mesh, storage=storage, compression=compression)
    places = jax.tree.map(lambda s: s.sharding, abstract)
    fresh = lambda k: _fresh(task, optimizer, k, storage, *_parts(task, mesh, compression))  # noqa: E731
    return jax.jit(fresh, out_shardings=places)(key)


def make_saved(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mesh: Mesh,
    storage: Storage = Storage(),
    compression: powersgd.Compression = UNCOMPRESSED,
) -> tuple[State, Callable[[State], State], Callable[[State], State]]:
    """The state as checkpoints hold it, abstractly, and functions to that form and back.

    They differ in `error` alone, of which a checkpoint holds the sum over the replicas, so that another number of them
    can go on (appendix E). There and back gives every replica the mean, with which a run goes on bit for bit.
    """
    abstract = abstract_state(task, optimizer, mesh=mesh, storage=storage, compression=compression)
    compressor = _parts(task, mesh, compression)[1]
    if compressor is None:
        return abstract, lambda state: state, lambda state: state
    places = {powersgd.name(path): p.sharding for path, p in jax.tree_util.tree_leaves_with_path(abstract["params"])}
    sums = jax.eval_shape(compressor.packed, abstract["error"])
    saved = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[n]) for n, s in sums.items()}
    pack = jax.jit(compressor.packed, out_shardings={n: s.sharding for n, s in saved.items()})
    unpack = jax.jit(compressor.unpacked, out_shardings=compressor.places)
    return (
        {**abstract, "error": saved},
        lambda state: {**state, "error": pack(state["error"])},
        lambda state: {**state, "error": unpack(state["error"])},
    )


def make_update(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    ema_every: int = 1,
    storage: Storage = Storage(),
    compression: powersgd.Compression = UNCOMPRESSED,
) -> Update:
    """The jitted `update(state, frozen, batch, key) -> (state, metrics)`; the old state is donated.

    accumulate: microbatches per batch; their gradients are averaged in float32, so the batch size must be a multiple
      of it.
    ema_decay: decay of the moving average, applied every `ema_every` updates; 0 keeps the average equal to the
      parameters. The transformer's paper value is 0.99 every 25 (appendix E), the dVAE's 0.999 every one (A.2).

    The metrics are the task's own, averaged over microbatches, and `loss`, `grad_norm` (before clipping), `skipped`
    (updates so far), `plateau_scale` (what halving on plateaus has made of the step size) and `log2_scale` (of float16
    gradients, one or an array of [layers, 2], before the update moved them).
    """
    scales, compressor = _parts(task, mesh, compression)
    abstract = abstract_state(task, optimizer, mesh=mesh, storage=storage, compression=compression)
    places = jax.tree.map(lambda s: s.sharding, abstract)

    def grads_of(params, frozen, batch, key, step, scale):
        def loss(params):
            own = {"scales": scale} if scales and scales.by_branch else {}
            value, metrics = task.loss(params, frozen, batch, key=key, step=step, **own)
            return value * scale if scales and not scales.by_branch else value, {**metrics, "loss": value}

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, metrics

    def accumulated(params, frozen, batch, key, step, scale):
        if accumulate == 1:
            return grads_of(params, frozen, batch, key, step, scale)

        # Microbatch i takes every accumulate-th example, so each device keeps the examples that it already holds.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(total, part):
            index, microbatch = part
            microbatch = jax.tree.map(lambda x: sharding.constrain(x, ("batch",) + (None,) * (x.ndim - 1)), microbatch)
            new = grads_of(params, frozen, microbatch, jax.random.fold_in(key, index), step, scale)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / accumulate, total, new), None

        microbatch = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda: grads_of(params, frozen, microbatch, key, step, scale))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        return jax.lax.scan(one, zero, (jnp.arange(accumulate), parts))[0]

    def of_replicas(params, frozen, batch, key, step, scale):
        """Gradients and metrics of each replica's own part of the batch, [replicas, ...]."""
        count = compressor.replicas
        own = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        place = jax.sharding.PartitionSpec(sharding.REPLICA, sharding.FSDP)
        own = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), own)
        keys = jax.random.split(jax.random.fold_in(key, REPLICAS), count)
        with sharding.independent(sharding.REPLICA):
            each = jax.vmap(accumulated, in_axes=(None, None, 0, 0, None, None), spmd_axis_name=sharding.REPLICA)
            return each(params, frozen, own, keys, step, scale)

    def averaged(ema, params, due):
        decay = jnp.where(due, ema_decay, 1.0 if ema_decay else 0.0)
        if storage.offload_ema:  # in every update: XLA has no conditional over arrays in host memory
            return moments.average_on_host(ema, params, decay, axes=task.model.axes)
        return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new.astype(old.dtype), ema, params)

    def update(state, frozen, batch, key):
        with sharding.use(mesh):
            params, step, opt_state = state["params"], state["step"], state["opt_state"]
            key = jax.random.fold_in(key, step)
            scale = state["scales"]["scale"] if scales else None
            grads, metrics = (of_replicas if compressor else accumulated)(params, frozen, batch, key, step, scale)
            grads, wide = moments.widened(grads), moments.widened(params)
            if scales and not scales.by_branch:
                grads = jax.tree.map(lambda g: g / scale, grads)
            if scales:
                in_range = jax.vmap(scales.finite)(grads).all(0) if compressor else scales.finite(grads)
            if compressor:
                metrics = jax.tree.map(lambda x: x.mean(0), metrics)
                all_finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
                rounding = jax.random.fold_in(key, LEFT_OUT)
                grads, error, grad_norm = compressor.exchange(grads, state["error"], rounding)
                grad_norm = jnp.where(all_finite, grad_norm, jnp.inf)
            else:
                grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            known = {"value": metrics["loss"], "norm": grad_norm}
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
            changes, new_opt_state = optimizer.update(grads, opt_state, wide, **known)
            opt_state = keep(new_opt_state, opt_state)
            wide = optax.apply_updates(wide, changes)
            new_params = moments.narrowed_like(wide, params, jax.random.fold_in(key, ROUNDING))
            params = keep(new_params, params)
            ema = averaged(state["ema"], params, (step + 1) % ema_every == 0)
            skipped = state["skipped"] + jnp.where(finite, 0, 1)
            new = {"params": params, "ema": ema, "opt_state": opt_state, "step": step + 1, "skipped": skipped}
            measured = {"grad_norm": grad_norm, "skipped": skipped}
            if scales:
                new["scales"] = scales.moved(state["scales"], in_range)
                measured["log2_scale"] = jnp.log2(scale)
            if isinstance(scale := optimizers.plateau_scale(opt_state), jax.Array):
                measured["plateau_scale"] = scale
            if compressor:
                new["error"] = keep(error, state["error"])
            return new, {**metrics, **measured}

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
        compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )


def average_of(state: State) -> Any:
    """The moving average, on the devices wherever it lies between updates."""
    return jax.tree.map(lambda average, p: jax.device_put(average, p.sharding), state["ema"], state["params"])


def make_evaluate(task: Task, *, mesh: Mesh) -> Callable[..., Metrics]:
    """The jitted `evaluate(params, frozen, batch, key, step) -> metrics`, the task's own and `loss`."""

    def evaluate(params, frozen, batch, key, step):
        with sharding.use(mesh):
            value, metrics = task.loss(params, frozen, batch, key=key, step=step)
            return {**metrics, "loss": value}

    return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
