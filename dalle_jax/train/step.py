"""One update: loss, gradient, accumulation over microbatches, optimizer, moving average, and what was measured.

The state is a nested dict of arrays:

    params      the model's parameters            opt_state   the optimizer's
    ema         their moving average              step        int32, updates attempted so far
    skipped     int32, updates left out because the loss, the gradient or a new parameter was not finite
    scales      of float16 gradients (`loss_scale.py`), where the model's precision has any
    error       what compression has left out so far (`powersgd.py`), where gradients are compressed
    memory      what the task remembers beside its parameters (`objectives/task.py`), where it does

Everything random in update number t comes from fold_in(key, t), so a resumed run repeats it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dalle_jax import sharding
from dalle_jax.train.ema import Ema, average, average_on_host
from dalle_jax.train.objectives.task import CODE_COUNTS, Batch, Memory, Metrics, Task
from dalle_jax.train.optimizer import loss_scale, matrices, moments, schedule
from dalle_jax.train.optimizer.powersgd import Compression, Mean, PowerSGD
from dalle_jax.train.settings import Storage

State = dict[str, Any]
# Folded into a key, numbers that neither a microbatch nor `powersgd.py` has.
ROUNDING, REMEMBERING = 2**31 - 1, 2**31 - 2
# Of the update, by platform. XLA's CPU backend otherwise drops the barriers that keep the backward pass from
# computing its rematerialized layers all at once; outside a loop that needs as much memory as keeping everything.
COMPILER_OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The update of a task on a mesh, and the state that it changes.

    optimizer: as `build_optimizer` makes it; any optax optimizer does.
    offload_ema: the moving average lives in the hosts' memory and passes through the device in every update, layer by
      layer.
    accumulate: microbatches per batch; their gradients are averaged in float32, so the batch size must be a multiple
      of it.
    """

    task: Task
    optimizer: optax.GradientTransformationExtraArgs
    mesh: Mesh
    _: dataclasses.KW_ONLY
    storage: Storage = Storage()
    offload_ema: bool = False
    compression: Compression = Compression()
    accumulate: int = 1
    ema: Ema = Ema()

    @functools.cached_property
    def abstract(self) -> State:
        """The state as jax.ShapeDtypeStruct with shardings: nothing is allocated."""
        shapes = jax.eval_shape(self._new_state, jax.random.key(0))
        params = sharding.shardings(self.task.model.abstract, self.task.model.axes, self.mesh)
        places = jax.tree.map(lambda _: sharding.replicated(self.mesh), shapes) | _filled(
            params=params,
            ema=jax.tree.map(sharding.on_host, params) if self.offload_ema else params,
            opt_state=sharding.like_params(shapes["opt_state"], params, self.mesh),
            error=self._reducer.places,
        )
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)

    def init(self, key: jax.Array) -> State:
        """A new state, built in place on the mesh: no array is ever whole on one device unless it is so small."""
        return jax.jit(self._new_state, out_shardings=_places(self.abstract))(key)

    @functools.cached_property
    def update(self) -> jax.stages.Wrapped:
        """The jitted `update(state, frozen, batch, key) -> (state, metrics)`; the old state is donated.

        The metrics are the task's, averaged over microbatches, and `loss`, `grad_norm` (before clipping), `skipped`
        (updates so far), `finite` (False where this one was skipped), `plateau_scale` (what halving on plateaus has
        made of the step size) and `log2_scale` (of float16 gradients, one or an array of [layers, 2], before the update
        moved them).
        """

        def update(state, frozen, batch, key):
            with sharding.use(self.mesh):
                return self._update(state, frozen, batch, key)

        return jax.jit(
            update,
            donate_argnums=0,
            out_shardings=(_places(self.abstract), sharding.replicated(self.mesh)),
            compiler_options=COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform),
        )

    @functools.cached_property
    def evaluate(self) -> Callable[..., Metrics]:
        """The jitted `evaluate(params, frozen, batch, key, step, memory) -> metrics`, the task's, `loss`, and
        CODE_COUNTS where the task observes them. memory: {} of a task without one."""

        def evaluate(params, frozen, batch, key, step, memory):
            with sharding.use(self.mesh):
                _, metrics, observed = self.task.measure(params, frozen, batch, key=key, step=step, memory=memory)
                return metrics | {name: observed[name] for name in (CODE_COUNTS,) if name in observed}

        return jax.jit(evaluate, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def saved(self) -> State:
        """`abstract` in the form in which checkpoints hold the state.

        They differ in `error` alone, of which a checkpoint holds the sum over the replicas, so that another number of
        them can go on (appendix E). There and back gives every replica the mean, with which a run goes on bit for bit.
        """
        return self.abstract | _filled(error=self._reducer.packed_abstract)

    def to_saved(self, state: State) -> State:
        return state | _filled(error=self._reducer.pack(state.get("error", {})))

    def from_saved(self, state: State) -> State:
        return state | _filled(error=self._reducer.unpack(state.get("error", {})))

    @property
    def scale_patience(self) -> int:
        """Updates in a row that may be skipped because a scale of float16 gradients has to fall."""
        return self._scaler.patience

    @functools.cached_property
    def _reducer(self) -> Mean | PowerSGD:
        if not self.compression.rank:
            return Mean()
        return PowerSGD(self.task.model.abstract, self.task.model.axes, compression=self.compression, mesh=self.mesh)

    @functools.cached_property
    def _scaler(self) -> loss_scale.NoScale:
        # Compressed gradients are those of each replica's local loss, the mean over its part of the batch.
        pieces = sharding.batch_ways(self.mesh) // self._reducer.replicas
        return loss_scale.for_model(self.task.model, replicas=pieces)

    def _new_state(self, key: jax.Array) -> State:
        params = self.task.model.init(key)
        kept = moments.DTYPES[self.storage.params]
        is_hidden = matrices.hidden_mask(self.task.model.axes)
        memory = self.task.memory(jax.random.fold_in(key, REMEMBERING)) if self.task.memory else {}
        return {
            "params": jax.tree.map(lambda p, hidden: p.astype(kept) if hidden else p, params, is_hidden),
            "ema": jax.tree.map(jnp.copy, params),
            "opt_state": self.optimizer.init(params),
            "step": jnp.zeros([], jnp.int32),
            "skipped": jnp.zeros([], jnp.int32),
        } | _filled(scales=self._scaler.init(), error=self._reducer.init(), memory=memory)

    def _update(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        params, scales, error = state["params"], state.get("scales", {}), state.get("error", {})
        memory = state.get("memory", {})
        key = jax.random.fold_in(key, state["step"])

        def gradients(batch, key):
            return self._gradients(params, frozen, batch, key, state["step"], scales, memory)

        grads, (metrics, observed) = self._reducer.per_replica(gradients)(batch, key)
        grads = self._scaler.unscaled(moments.to_float32(grads), scales)
        in_range = self._reducer.everywhere(self._scaler.finite, grads)
        grads, grad_norm, error = self._reducer.reduce(grads, error, key)

        wide = moments.to_float32(params)
        changes, opt_state = self.optimizer.update(
            grads, state["opt_state"], wide, value=metrics["loss"], norm=grad_norm
        )
        params = moments.cast_like(optax.apply_updates(wide, changes), params, jax.random.fold_in(key, ROUNDING))
        if self.task.remember:
            remembering = jax.random.fold_in(key, REMEMBERING)
            params, memory = self.task.remember(params, memory, observed, key=remembering, step=state["step"])
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        new = {"params": params, "opt_state": opt_state} | _filled(error=error, memory=memory)
        old = {name: state[name] for name in new}
        # Checked after a first choice, as a check before it makes the CPU's compiler round the update in another way.
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        kept = _all_finite(new["params"])
        new = jax.tree.map(lambda n, o: jnp.where(kept, n, o), new, old)
        finite &= kept

        step, skipped = state["step"] + 1, state["skipped"] + jnp.where(finite, 0, 1)
        new |= {"ema": self._average(state["ema"], new["params"], step), "step": step, "skipped": skipped}
        new |= _filled(scales=self._scaler.updated(scales, in_range))
        metrics |= {"grad_norm": grad_norm, "skipped": skipped, "finite": finite}
        return new, metrics | self._scaler.measured(scales) | schedule.measured(new["opt_state"])

    def _gradients(
        self, params, frozen, batch: Batch, key, step, scales, memory: Memory
    ) -> tuple[Any, tuple[Metrics, dict[str, Any]]]:
        """Gradients and metrics of the mean over the microbatches, one after the other, and what each observed."""

        def of_one(batch, key):
            def loss(params):
                options = self._scaler.loss_options(scales)
                value, metrics, observed = self.task.measure(
                    params, frozen, batch, key=key, step=step, memory=memory, **options
                )
                return self._scaler.scaled(value, scales), (metrics, observed)

            (_, (metrics, observed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return (grads, metrics), observed

        if self.accumulate == 1:
            (grads, metrics), observed = of_one(batch, key)
            return grads, (metrics, jax.tree.map(lambda x: x[None], observed))

        def add(total, part):
            index, microbatch = part
            microbatch = jax.tree.map(lambda x: sharding.constrain(x, ("batch",) + (None,) * (x.ndim - 1)), microbatch)
            new, observed = of_one(microbatch, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / self.accumulate, total, new), observed

        # Microbatch i takes every accumulate-th example, so each device keeps the examples that it already holds.
        parts = jax.tree.map(lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes, _ = jax.eval_shape(lambda: of_one(jax.tree.map(lambda x: x[0], parts), key))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        (grads, metrics), observed = jax.lax.scan(add, zero, (jnp.arange(self.accumulate), parts))
        return grads, (metrics, observed)

    def _average(self, ema: Any, params: Any, step: jax.Array) -> Any:
        decay = self.ema.decay_at(step)
        if self.offload_ema:
            return average_on_host(ema, params, decay, axes=self.task.model.axes, followed=self.task.followed)
        return average(ema, params, decay, followed=self.task.followed)


def ema_params(state: State) -> Any:
    """The moving average, on the devices wherever it lies between updates."""
    return jax.tree.map(lambda average, p: jax.device_put(average, p.sharding), state["ema"], state["params"])


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _places(abstract: State) -> Any:
    return jax.tree.map(lambda s: s.sharding, abstract)


def _filled(**parts: Any) -> State:
    """The parts of a state that this run has: not those that are empty."""
    return {name: part for name, part in parts.items() if part}
