"""One training run: from a config and a workdir to a trained model, or on with the training that is there.

Makes the workdir self-contained before the first update: config.json, the tokenizer and the frozen dVAE lie in it,
so a run can be moved, resumed and sampled from without the files it was started with.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dalle_jax import config as configs
from dalle_jax import distributed, files, model_dir, sharding
from dalle_jax.checkpoint import reader
from dalle_jax.data import sources
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare
from dalle_jax.data.record import Source
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.data.share import Share
from dalle_jax.errors import UserError, say
from dalle_jax.mesh import demand, describe, make_mesh
from dalle_jax.models import Model
from dalle_jax.models.attention import kernels
from dalle_jax.models.layers import compute_dtype
from dalle_jax.text import Tokenizer, load_tokenizer
from dalle_jax.train import compilation_cache, loop
from dalle_jax.train.ema import Ema
from dalle_jax.train.monitor import tracing
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer import powersgd
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.step import Storage, TrainStep

DVAE, TOKENIZER = "dvae", "tokenizer.model"  # inside the workdir
SOURCE_KEYS = ("train", "validation", "lanes")  # of config.data; the others are DataConfig's
LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "keep_checkpoints": 1, "rollback_after": 0}


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    *,
    hooks: Sequence[loop.Hook] = (),
    progress: bool = True,
    profile: tracing.Window | None = None,
) -> loop.Result:
    """Train `config` in `workdir`, going on from its newest checkpoint; see `loop.run`.

    Raises:
      UserError: an impossible config, a missing source, dVAE or tokenizer, parts that do not fit each other, a workdir
        that cannot be written or belongs to another config.
    """
    limits = config.processes
    with distributed.Watchdog(
        limits.hang_seconds, first_seconds=limits.compile_seconds, start_seconds=limits.start_seconds
    ) as watchdog:
        distributed.gather_json(None)  # the first collective connects all; until it is done the job is starting
        watchdog.beat(0, "prepare")
        return _train(
            config, pathlib.Path(workdir), hooks=hooks, progress=progress, profile=profile, beat=watchdog.beat
        )


def _train(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, hooks, progress, profile, beat) -> loop.Result:
    config = ml_collections.ConfigDict(config.to_dict())
    check_values(config)
    _check_machine(config)
    tokenizer = _tokenizer(config, workdir) if "tokenizer" in config else None
    _check_workdir(config, workdir)
    own = workdir / DVAE
    if config.name == "transformer" and (own / model_dir.CONFIG).exists():
        task = build_task(ml_collections.ConfigDict({**config.to_dict(), "dvae": str(own)}))
        model_dir.check_dvae(workdir, task.frozen_sha256)
    else:
        task = build_task(config)
    mesh = mesh_for(config, task.model)
    if progress and jax.process_index() == 0:
        say(describe(mesh))
    layout = task.model.config.layout if tokenizer else None
    batches, validation = _data(config, mesh, layout=layout, tokenizer=tokenizer, dvae_sha256=task.frozen_sha256)
    distributed.gather_json(None)  # nobody reads any more what the first process writes now
    _fill_workdir(config, workdir, task, tokenizer)
    if not reads_pictures(config):
        task = dataclasses.replace(task, frozen={})  # nothing will ask for the dVAE: leave its memory to others
    with contextlib.closing(batches), compilation_cache.kept(workdir):
        return loop.run(
            step_for(config, task, mesh),
            config,
            workdir,
            batches=batches,
            validation=validation,
            hooks=hooks,
            progress=progress,
            profile=profile,
            beat=beat,
        )


def mesh_for(config: ml_collections.ConfigDict, model: Model, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (default: all), with every -1 chosen so that model and batch fit.

    Raises:
      UserError: no such mesh, with the nearest possible ones; see `make_mesh` and `demand`. Or
        `config.compression` saves nothing on it; see `powersgd.check_rank`.
    """
    ask = demand(model.abstract, model.axes, batch_size=config.batch_size, accumulate=config.accumulate)
    mesh = make_mesh(config.mesh, devices=devices, unfit=ask)
    if config.compression.rank:
        compression = Compression(**config.compression)
        found = powersgd.layouts(model.abstract, model.axes, compression=compression, mesh=mesh)
        item = compute_dtype(config.precision)(0).dtype.itemsize
        powersgd.check_rank(found, form=compression.format, item=item)
    return mesh


def step_for(config: ml_collections.ConfigDict, task: Task, mesh: Mesh) -> TrainStep:
    """The update of a config's task on a mesh."""
    return TrainStep(
        task,
        build_optimizer(Optimizer(**config.optimizer), steps=config.steps, axes=task.model.axes),
        mesh,
        storage=Storage(**config.storage),
        compression=Compression(**config.compression),
        accumulate=config.accumulate,
        ema=Ema(**config.ema),
    )


def reads_pictures(config: ml_collections.ConfigDict) -> bool:
    """Does training or validation read pictures, or nothing but their codes?"""
    train, validation = config.data.train, config.data.validation
    return not sources.is_tokens(train) or bool(validation and not sources.is_tokens(validation))


def check_values(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for values that no model, mesh or data can make good."""
    if "steps" not in config:
        raise UserError(f"expected the config of a model to train, got one of {config.name}: see configs/")
    values = configs.flatten(config)
    for name, least in LEAST.items():
        if values[name] < least:
            raise UserError(f"expected config.{name} of at least {least}, got {values[name]}: set --config.{name}=N")
    Optimizer(**config.optimizer), Ema(**config.ema), Storage(**config.storage), Compression(**config.compression)
    if config.precision.startswith("fp16"):
        if config.storage.params != "fp32":
            raise UserError(
                f"expected config.storage.params = fp32 with config.precision = {config.precision}, got "
                f"{config.storage.params}: gradients would be rounded a second time, to fewer bits; change one of them"
            )
        if jax.default_backend() == "tpu":
            raise UserError(
                f"expected a GPU or CPU for config.precision = {config.precision}, got a TPU, which has no float16 "
                "arithmetic: set --config.precision=bf16"
            )
    if config.compression.rank and config.name != "transformer":
        raise UserError(
            f"expected config.compression.rank = None for a {config.name}, got {config.compression.rank}: its loss may "
            "be no mean over examples (CLIP's pairs, a dVAE's `balance`), of which replicas could take a part each"
        )
    if config.storage.offload_ema and not config.ema.decay:
        raise UserError(
            "expected config.ema.decay above 0 with config.storage.offload_ema, got 0, with which the average is "
            "the parameters: leave one of them out"
        )


def _check_machine(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for what these devices cannot run."""
    if config.name == "transformer":
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", None)  # '9.0' of an NVIDIA GPU
        kernels.check_machine(
            config.model.attention,
            machine=device.device_kind,
            platform=jax.default_backend(),
            capability=tuple(map(int, capability.split("."))) if capability else None,
        )


def _tokenizer(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Tokenizer:
    """The workdir's own tokenizer, else the one the config names; `model.text_vocab` 0 takes its size."""
    own = workdir / TOKENIZER
    if not own.exists() and not config.tokenizer:
        raise UserError(f"a {config.name} needs a tokenizer: give its file as --config.tokenizer=FILE")
    tokenizer = load_tokenizer(own if own.exists() else config.tokenizer)
    config.model.text_vocab = config.model.text_vocab or tokenizer.vocab_size
    if tokenizer.vocab_size != config.model.text_vocab:
        raise UserError(
            f"expected a tokenizer of {config.model.text_vocab} entries (config.model.text_vocab), got "
            f"{tokenizer.vocab_size} in {config.tokenizer}: use the one that belongs to the model or change the config"
        )
    return tokenizer


def _check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    if (workdir / model_dir.CONFIG).exists():
        configs.refuse_other(model_dir.read_config(workdir), config.to_dict(), where=str(workdir))
    elif reader.complete_steps(workdir, config.checkpoint_dir):
        raise UserError(f"expected {workdir / model_dir.CONFIG} beside the checkpoints there, got none: restore it")


def data_config(config: ml_collections.ConfigDict) -> DataConfig:
    """How records are prepared: what `config.data` says beside the names of its sources.

    Raises:
      UserError: values that are impossible.
    """
    try:
        return DataConfig(**{key: value for key, value in config.data.items() if key not in SOURCE_KEYS})
    except ValueError as error:
        raise UserError(f"expected a possible config.data, got one where {error}") from error


def _data(config: ml_collections.ConfigDict, mesh, *, layout, tokenizer, dvae_sha256: str):
    """The training batches, and a function that makes held-out ones (None without a validation source)."""
    if not config.data.train:
        raise UserError("a run needs data: name its source as --config.data.train=SOURCE, e.g. folder:DIR")
    data = data_config(config)
    prepare = Prepare(data, layout, tokenizer)
    share = Share(*sharding.batch_share(mesh))

    def open_source(spec: str, asked_by: str, augment: str) -> Source:
        needs_pictures = config.name != "transformer"
        source = sources.open_source(spec, captions_required=tokenizer is not None, pictures_required=needs_pictures)
        if sources.is_tokens(spec):
            source.check_made_by(sha256=dvae_sha256, augment=augment, asked_by=asked_by)
        return source

    batches = ShardedBatches(
        open_source(config.data.train, "config.data.augment", data.augment),
        prepare,
        batch_size=config.batch_size,
        seed=config.seed,
        shards=config.data.lanes or None,
        share=share,
        gather=distributed.gather_json,
    )
    if not config.data.validation:
        return batches, None
    plain = data.without_randomness()
    held_out = open_source(config.data.validation, "validation", plain.augment)

    def validation() -> Iterable[Mapping[str, np.ndarray]]:
        fresh = Batches(
            held_out,
            dataclasses.replace(prepare, config=plain),
            batch_size=config.batch_size // share.count,
            seed=config.seed,
            shuffle=False,
            epochs=1,
            share=share,
        )
        try:
            yield from _in_step(fresh)
        finally:
            fresh.close()

    return batches, validation


def _in_step(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterable[Mapping[str, np.ndarray]]:
    """As many batches of the same sizes on every process: to where the first of them ends."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        size = min(distributed.gather_json(0 if batch is None else len(next(iter(batch.values())))))
        if not size:
            return
        yield {name: value[:size] for name, value in batch.items()}


def _fill_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path, task: Task, tokenizer) -> None:
    """Write what a resumed run and a sampler need; config.json last, as it says that the rest is there."""
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and not (workdir / TOKENIZER).exists():
            tokenizer.save(workdir)
        if config.name == "transformer" and not (workdir / DVAE / model_dir.CONFIG).exists():
            dvae_config = model_dir.read_config(config.dvae)
            files.write(workdir / model_dir.DVAE_SHA256, f"{task.frozen_sha256}\n")
            model_dir.save(workdir / DVAE, {key: dvae_config[key] for key in ("name", "model")}, task.frozen)
        files.write(workdir / model_dir.CONFIG, configs.to_json(config))
    except OSError as error:
        raise UserError(f"expected a workdir to write to, got {workdir} ({error.strerror}): choose another") from error
