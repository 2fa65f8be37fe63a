"""One training run: from settings and a workdir to a trained model, or on with the training that is there.

Makes the workdir self-contained before the first update: config.json, the tokenizer and the frozen models lie in it,
so a run can be moved, resumed and sampled from without the files it was started with.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax import config, distributed, files, model_dir, sharding
from dalle_jax.checkpoint import reader
from dalle_jax.data import sources
from dalle_jax.data.pipeline import Batches, Prepare
from dalle_jax.data.record import Source
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.data.share import Share
from dalle_jax.data.sources.features import TokenSource
from dalle_jax.errors import UserError, say, writing_to
from dalle_jax.mesh import CHOOSE, demand, describe, make_mesh
from dalle_jax.model_dir import ModelDir
from dalle_jax.models.attention import kernels
from dalle_jax.models.layers import compute_dtype
from dalle_jax.text import TrainingTokenizer, check_fits, has_tokenizer, load_tokenizer
from dalle_jax.text.published import PublishedTokenizer
from dalle_jax.train import compilation_cache, loop
from dalle_jax.train.aside import Hook
from dalle_jax.train.objectives import build_task, frozen_roles, optional_roles
from dalle_jax.train.objectives.task import Frozen, Task
from dalle_jax.train.optimizer import powersgd
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.settings import TrainSettings
from dalle_jax.train.step import TrainStep

LOCK = ".training"  # inside the workdir
# Besides `run.`: what computes attention depends on the machine, and changes the order of sums alone.
MAY_CHANGE = ("model.attention",)

Batch = Mapping[str, np.ndarray]


def train(
    settings: TrainSettings,
    workdir: str | pathlib.Path,
    *,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
    profile: range | None = None,
) -> loop.Result:
    """Train in `workdir`, going on from its newest checkpoint; see `loop.run`.

    Raises:
      UserError: a missing source, frozen model or tokenizer, parts that do not fit each other, a workdir that cannot be
        written or belongs to other settings.
    """
    limits = settings.run.processes
    with distributed.Watchdog(
        limits.hang_seconds, first_seconds=limits.compile_seconds, start_seconds=limits.start_seconds
    ) as watchdog:
        distributed.gather_json(None)  # the first collective connects all; until it is done the job is starting
        watchdog.beat(0, "prepare")
        return _train(
            settings, pathlib.Path(workdir), hooks=hooks, progress=progress, profile=profile, beat=watchdog.beat
        )


def _train(settings: TrainSettings, workdir: pathlib.Path, **of_loop) -> loop.Result:
    device = jax.devices()[0]
    version = getattr(device, "compute_capability", None)  # '9.0' of an NVIDIA GPU
    major, _, minor = (version or "").partition(".")
    check_machine(
        settings,
        machine=device.device_kind,
        platform=jax.default_backend(),
        capability=(int(major), int(minor)) if version else None,
    )
    _check_workdir(settings, workdir)
    tokenizer = _load_tokenizer(settings, workdir)
    frozen = load_frozen(settings, workdir)
    task = build_task(settings, frozen)
    mesh = mesh_for(settings, task)
    if of_loop["progress"] and jax.process_index() == 0:
        say(describe(mesh))
    batches, validation = open_data(settings, mesh, tokenizer=tokenizer, frozen=frozen)
    distributed.gather_json(None)  # nobody reads any more what the first process writes now
    task = dataclasses.replace(task, frozen=frozen_in_use(settings, task))
    with (
        contextlib.closing(batches),
        _alone_in(workdir, settings),
        compilation_cache.kept(workdir),
        jax.default_prng_impl("threefry2x32"),  # the numbers of a seed are these, whatever JAX's flags say
        jax.threefry_partitionable(True),
    ):
        _fill_workdir(settings, workdir, tokenizer=tokenizer, frozen=frozen)
        result = loop.run(
            step_for(settings, task, mesh), settings, workdir, batches=batches, validation=validation, **of_loop
        )
    if batches.cut and of_loop["progress"] and jax.process_index() == 0:
        length = task.model.config.layout.caption_len
        say(f"{batches.cut} of {batches.good} captions were longer than the {length} tokens that the model reads")
    return result


def mesh_for(settings: TrainSettings, task: Task, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `settings.run.mesh` over `devices` (default: all), its open sizes such that model and batch fit.

    Raises:
      UserError: no such mesh, with the nearest possible ones; see `make_mesh` and `demand`. Or compression that the
        loss does not allow, or that saves nothing on this mesh; see `powersgd.check_rank`.
    """
    model, compression = task.model, settings.compression
    ask = demand(model.abstract, model.axes, batch_size=settings.batch_size, accumulate=settings.accumulate)
    sizes = {axis: size or CHOOSE for axis, size in dataclasses.asdict(settings.run.mesh).items()}
    mesh = make_mesh(sizes, devices=devices, unfit=ask)
    if compression.rank:
        if not task.mean_over_examples:
            raise UserError(
                f"expected config.compression.rank = None for a {task.name}, got {compression.rank}: its loss may be "
                "no mean over examples (CLIP's pairs, a dVAE's `balance`), of which replicas could take a part each"
            )
        found = powersgd.layouts(model.abstract, model.axes, compression=compression, mesh=mesh)
        item = compute_dtype(settings.model.precision)(0).dtype.itemsize
        powersgd.check_rank(found, form=compression.format, item=item)
    return mesh


def step_for(settings: TrainSettings, task: Task, mesh: Mesh) -> TrainStep:
    """The update of a task on a mesh."""
    return TrainStep(
        task,
        build_optimizer(settings.optimizer, steps=settings.run.steps, axes=task.model.axes),
        mesh,
        storage=settings.storage,
        offload_ema=settings.run.offload_ema,
        compression=settings.compression,
        accumulate=settings.accumulate,
        ema=settings.ema,
    )


def reads_images(settings: TrainSettings) -> bool:
    """Whether training or validation reads images, not only their tokens."""
    train, validation = settings.run.data.train, settings.run.data.validation
    return not (train and sources.is_tokens(train)) or bool(validation and not sources.is_tokens(validation))


def frozen_in_use(settings: TrainSettings, task: Task) -> Frozen:
    """The frozen parameters that updates read: where no image is made tokens, all but the image tokenizer's."""
    return {r: params for r, params in task.frozen.items() if r != "image_tokenizer" or reads_images(settings)}


def load_frozen(settings: TrainSettings, workdir: pathlib.Path) -> dict[str, ModelDir]:
    """Role -> frozen model: the workdir's copies, else those that the settings name, if they must name them.

    Raises:
      UserError: one is missing, damaged, or not what the role asks for.
    """
    frozen = {}
    for role in frozen_roles(settings):
        if model_dir.has_frozen(workdir, role):
            frozen[role] = model_dir.load_frozen(workdir, role)
        elif folder := settings.frozen.get(role):
            frozen[role] = model_dir.load(folder, model_dir.ROLES[role])
        elif role not in optional_roles(settings):
            what = role.replace("_", " ")
            raise UserError(f"a {settings.name} needs a trained {what}: give its folder as --config.frozen.{role}=DIR")
    return frozen


def _load_tokenizer(settings: TrainSettings, workdir: pathlib.Path) -> TrainingTokenizer | None:
    """The workdir's tokenizer, else the one that the settings name; None for a model that reads no captions."""
    text_vocab = getattr(settings.model, "text_vocab", None)
    if text_vocab is None:
        return None
    place = workdir if has_tokenizer(workdir) else settings.tokenizer
    if place is None:
        raise UserError(f"a {settings.name} needs a tokenizer: give its file as --config.tokenizer=FILE")
    tokenizer = load_tokenizer(place)
    if not isinstance(tokenizer, TrainingTokenizer):
        raise UserError(f"expected a tokenizer that `dalle-jax tokenizer` made in {place}, got CLIP's: train one")
    if tokenizer.vocab_size != text_vocab and not isinstance(tokenizer, PublishedTokenizer):
        raise UserError(
            f"expected a tokenizer of {text_vocab} entries (config.model.text_vocab), got {tokenizer.vocab_size} in "
            f"{place}: use the one that belongs to the model, or set --config.model.text_vocab={tokenizer.vocab_size}"
        )
    check_fits(tokenizer, settings.model.layout, place)
    return tokenizer


def check_machine(settings: TrainSettings, *, machine: str, platform: str, capability: tuple[int, int] | None) -> None:
    """Raises UserError for what these devices cannot run; see `kernels.check_machine`."""
    precision = settings.model.precision
    if precision.startswith("fp16") and platform == "tpu":
        raise UserError(
            f"expected a GPU or CPU for config.model.precision = {precision}, got a TPU, which has no float16 "
            "arithmetic: set --config.model.precision=bf16"
        )
    if attention := getattr(settings.model, "attention", None):
        kernels.check_machine(attention, machine=machine, platform=platform, capability=capability)


def _check_workdir(settings: TrainSettings, workdir: pathlib.Path) -> None:
    """Raises UserError if something else was begun in the workdir, or it lies among the pictures to train on."""
    for spec in filter(None, (settings.run.data.train, settings.run.data.validation)):
        sources.check_outside(spec, workdir)
    if not (workdir / model_dir.CONFIG).exists():
        if reader.complete_steps(workdir, settings.run.checkpoint_dir):
            raise UserError(f"expected {workdir / model_dir.CONFIG} beside the checkpoints there, got none: restore it")
        return
    there = model_dir.read_config(workdir)
    if "run" not in there:
        raise UserError(
            f"expected a run of this version in {workdir}, got one of version 0.1 or an exported model: `sample`, "
            "`evaluate`, `serve` and `export` read it; train it further with dalle-jax 0.1, or take another --workdir"
        )
    changed = {
        key: values
        for key, values in config.differences(there, dataclasses.asdict(settings)).items()
        if not key.startswith("run.") and key not in MAY_CHANGE
    }
    if changed:
        listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in sorted(changed.items()))
        raise UserError(f"{workdir} belongs to another config ({listed}): use these values again or another --workdir")


def open_data(
    settings: TrainSettings, mesh: Mesh, *, tokenizer: TrainingTokenizer | None, frozen: Mapping[str, ModelDir]
) -> tuple[ShardedBatches, Callable[[], Iterator[Batch]] | None]:
    """The training batches, and a function that makes held-out ones (None without a validation source)."""
    given = settings.run.data
    if given.train is None:
        raise UserError("a run needs data: name its source as --config.run.data.train=SOURCE, e.g. folder:DIR")
    layout = getattr(settings.model, "layout", None) if tokenizer else None
    prepare = Prepare(settings.data, layout, tokenizer)
    share = Share(*sharding.batch_share(mesh))
    image_tokenizer = frozen.get("image_tokenizer")

    def open_source(spec: str, asked_by: str, augment: str) -> Source:
        source = sources.open_source(
            spec, captions_required=tokenizer is not None, pictures_required=image_tokenizer is None
        )
        if isinstance(source, TokenSource) and image_tokenizer is not None:
            source.check_made_by(sha256=image_tokenizer.digest, augment=augment, asked_by=asked_by)
        return source

    batches = ShardedBatches(
        open_source(given.train, "config.data.augment", settings.data.augment),
        prepare,
        batch_size=settings.batch_size,
        seed=settings.seed,
        shards=given.shards,
        share=share,
        reading=given,
        gather=distributed.gather_json,
    )
    if given.validation is None:
        return batches, None
    plain = settings.data.without_randomness()
    held_out = open_source(given.validation, "validation", plain.augment)

    def validation() -> Iterator[Batch]:
        once = Batches(
            held_out,
            dataclasses.replace(prepare, config=plain),
            batch_size=settings.batch_size // share.count,
            seed=settings.seed,
            shuffle=False,
            epochs=1,
            share=share,
            reading=given,
        )
        with contextlib.closing(once):
            yield from _in_step(once)

    return batches, validation


def _in_step(batches: Iterable[Batch]) -> Iterator[Batch]:
    """As many batches of the same sizes on every process: to where the first of them ends."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        size = min(distributed.gather_json(0 if batch is None else len(next(iter(batch.values())))))
        if batch is None or not size:
            return
        yield {name: value[:size] for name, value in batch.items()}


@contextlib.contextmanager
def _alone_in(workdir: pathlib.Path, settings: TrainSettings) -> Iterator[None]:
    """Make the workdir, and keep other trainings out of it until the block ends.

    A job of several processes, which a launcher starts again, waits for what is left of the one before to end.

    Raises:
      UserError: it cannot be written, or another training is at work in it.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:  # the one that writes
            with writing_to(workdir, "workdir"):
                workdir.mkdir(parents=True, exist_ok=True)
                seconds = settings.run.processes.hang_seconds if jax.process_count() > 1 else 0
                free = stack.enter_context(files.locked(workdir / LOCK, seconds=seconds))
            if not free:
                raise UserError(
                    f"expected {workdir} without another training at work in it, got one: wait for its end or stop it, "
                    "or take another --workdir"
                )
        yield


def _fill_workdir(
    settings: TrainSettings,
    workdir: pathlib.Path,
    *,
    tokenizer: TrainingTokenizer | None,
    frozen: Mapping[str, ModelDir],
) -> None:
    """Write what a resumed run and a sampler need; config.json last, as it says that the rest is there."""
    if jax.process_index() != 0:
        return
    with writing_to(workdir, "workdir"):
        if tokenizer is not None and not has_tokenizer(workdir):
            tokenizer.save(workdir)
        if not all(model_dir.has_frozen(workdir, role) for role in frozen):
            model_dir.save_frozen(workdir, frozen)
        files.write(workdir / model_dir.CONFIG, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
