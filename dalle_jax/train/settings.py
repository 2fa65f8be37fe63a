"""Settings of a training run: every key of a training config with its default and its range.

`load_settings` makes them of a config file and overrides, `TrainSettings.of` of plain nested values such as those of
config.json. Parts that belong to one mechanism stand beside it: models, `data.pipeline`, `optimizer`, `ema`. What a run
may change when it goes on in its workdir is under `run`.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dalle_jax import config
from dalle_jax.data.pipeline import DataConfig, Reading
from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.models import make_config
from dalle_jax.train.adversary import Adversary
from dalle_jax.train.codebook import Codebook
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer import moments
from dalle_jax.train.optimizer.build import Optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.optimizer.schedule import cosine

MAX_STEPS = 2**31 - 1  # they are counted in an int32
MAX_WEIGHT = 1e6  # of a part of a loss, and temperature
MAX_SECONDS = 7 * 24 * 3_600
LIKELIHOODS = ("logit_laplace", "gaussian")


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form of the state between steps; a step computes in float32 or in the model's `precision` whatever it is."""

    # Of the hidden matrices, 'fp32' or 'bf16', rounded at random after every update (`optimizer/moments.py`). Their
    # gradients are bfloat16 then too; the moving average, embeddings, heads, gains and biases stay float32.
    params: str = "fp32"

    def __post_init__(self):
        check_choice("config.storage.params", self.params, moments.DTYPES)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """A half cosine from `start` at step 0 to `end` at step `steps`, constant after (appendix A.2)."""

    start: float
    end: float
    steps: int  # 0: `end` from the first step

    def __call__(self, step):
        return cosine(self.start, self.end, self.steps)(step) if self.steps else jnp.float32(self.end)


@dataclasses.dataclass(frozen=True)
class DVAEObjective:
    """The loss of a dVAE. The defaults are the paper's (appendix A.2); `likelihood` and `balance` can leave it."""

    beta: Cosine = Cosine(0.0, 6.6, 5_000)  # weight of the KL
    temperature: Cosine = Cosine(1.0, 1 / 16, 150_000)  # of the relaxation
    # 'logit_laplace' with a learned scale, or 'gaussian' of fixed scale around sigmoid(mu): on flat graphics a learned
    # scale runs away and the codebook collapses.
    likelihood: str = "logit_laplace"
    # Weight of KL(mean posterior of the batch || uniform), in nats, weighted by how much there is to see at a position,
    # so that an even background does not have to be spread over many image tokens.
    balance: float = 0.0

    def __post_init__(self):
        key = "config.objective"
        check_choice(f"{key}.likelihood", self.likelihood, LIKELIHOODS)
        check_number(f"{key}.balance", self.balance, min=0, max=MAX_WEIGHT)
        for part in ("start", "end"):
            check_number(f"{key}.beta.{part}", getattr(self.beta, part), min=0, max=MAX_WEIGHT)
            check_number(f"{key}.temperature.{part}", getattr(self.temperature, part), above=0, max=MAX_WEIGHT)
        for name in ("beta", "temperature"):
            check_number(f"{key}.{name}.steps", getattr(self, name).steps, min=0, max=MAX_STEPS, whole=True)


@dataclasses.dataclass(frozen=True)
class VQObjective:
    """The loss of an image tokenizer with a codebook: weights of its parts, each a mean over the values of a picture.

    Pixels are in the model's range, but for the perceptual part. `absolute` and `perceptual` alone are VQGAN's (Esser
    et al. 2021, as taming-transformers has them), `squared` alone is that of van den Oord et al. 2017.
    """

    absolute: float = 1.0  # |x - y|
    squared: float = 0.0  # (x - y)^2, divided by
    variance: float = 1.0  # of the training data, so that the error of their mean picture is 1
    charbonnier: float = 0.0  # sqrt((x - y)^2 + 0.001^2)
    edges: float = 0.0  # the same of the differences of neighboring pixels, down and across
    perceptual: float = 1.0  # LPIPS of `frozen.lpips`, or the edge error that stands in for it (`models/lpips.py`)
    adversary: Adversary | None = None  # a discriminator, for whose eyes the decoder works too
    codebook: Codebook | None = None  # with 'nearest'; codes of 'gumbel' learn from the loss alone
    # With 'gumbel' alone: of the relaxation, and weight of the mean KL(q || uniform) of a position, in nats.
    temperature: Cosine | None = None
    kl: float = 0.0

    def __post_init__(self):
        key = "config.objective"
        for name in ("absolute", "squared", "charbonnier", "edges", "perceptual", "kl"):
            check_number(f"{key}.{name}", getattr(self, name), min=0, max=MAX_WEIGHT)
        check_number(f"{key}.variance", self.variance, above=0, max=MAX_WEIGHT)
        if not any((self.absolute, self.squared, self.charbonnier)):
            raise UserError(
                f"expected one of {key}.absolute, {key}.squared and {key}.charbonnier above 0, got none, with which "
                "nothing would ask for the pictures' colors: set one"
            )
        if self.temperature:
            for part in ("start", "end"):
                check_number(f"{key}.temperature.{part}", getattr(self.temperature, part), above=0, max=MAX_WEIGHT)
            check_number(f"{key}.temperature.steps", self.temperature.steps, min=0, max=MAX_STEPS, whole=True)


# `config.name` -> dataclass of `config.objective`, where it has settings
OBJECTIVE_SETTINGS: dict[str, type] = {"dvae": DVAEObjective, "vq": VQObjective}


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh. A size of None is chosen: fsdp as much of a slice of fast links as the
    model divides into, replica the rest (`mesh.py`). Another mesh changes the order of sums."""

    replica: int | None = None
    fsdp: int | None = None
    tensor: int | None = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_number(f"config.run.mesh.{field.name}", value, min=1, max=2**20, whole=True, optional=True)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Time limits of the processes of a job that wait for one another (`distributed/watchdog.py`), in seconds."""

    start_seconds: int = 300  # until all are connected
    hang_seconds: int = 300  # one may be silent or stuck for so long before the job ends
    compile_seconds: int = 3_600  # and so long where programs are compiled

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_number(f"processes.{field.name}", value, min=1, max=MAX_SECONDS, whole=True)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """FID and CLIP scores of samples while a model trains: one picture for each of `count` held-out captions."""

    every: int | None = None  # steps; None: never
    count: int = 64
    reference_count: int = 512  # held-out pictures that the samples are compared with
    weights: str | None = None  # of the Inception that FID takes
    clip: str | None = None  # folder of the CLIP that scores

    def __post_init__(self):
        key = "config.run.evaluate"
        check_number(f"{key}.every", self.every, min=1, max=MAX_STEPS, whole=True, optional=True)
        check_number(f"{key}.count", self.count, min=1, max=1_000_000, whole=True)
        check_number(f"{key}.reference_count", self.reference_count, min=2, max=10_000_000, whole=True)
        if self.every and not self.weights and not self.clip:
            raise UserError(f"expected a network for {key}.every, got none: give {key}.weights, {key}.clip or both")


@dataclasses.dataclass(frozen=True)
class Sources(Reading):
    """Where records come from, and how they are read.

    A source may have another name when a run goes on, as long as it holds the same records: of those that are trained
    on their number and the keys of sixteen are compared, contents are not.
    """

    train: str | None = None  # e.g. wds:PATTERN or folder:DIR, of a transformer tokens:DIR too
    validation: str | None = None  # held-out records; None: no validation
    # The largest number of processes that may ever read them; None: as many as read them first (`data/shards.py`).
    shards: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("config.run.data.shards", self.shards, min=1, max=2**20, whole=True, optional=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings that may change when a run goes on in its workdir. Two of them change numbers: `mesh`, by the order of
    sums, and `steps`, where a schedule ends with it."""

    steps: int  # updates of the optimizer
    data: Sources = Sources()
    mesh: MeshSizes = MeshSizes()
    processes: Processes = Processes()
    offload_ema: bool = False  # the moving average lies in the hosts' memory between updates
    # Every so many steps; None: never. Training ends with a checkpoint in any case.
    log_every: int | None = 50
    validate_every: int | None = 1_000
    validation_batches: int = 16
    picture_every: int | None = 1_000
    evaluate: Evaluate | None = None  # of models that draw samples
    checkpoint_every: int | None = 1_000
    check_replicas_every: int | None = None  # and before each checkpoint: do devices that must agree hold the same?
    keep_checkpoints: int = 2  # the newest
    keep_every_hours: float | None = None  # and one in so many hours for ever
    checkpoint_dir: str | None = None  # e.g. gs://bucket/run; None: below the workdir
    rollback_after: int | None = 20  # skipped updates in a row, then back to the last checkpoint; None: never

    def __post_init__(self):
        for name in ("steps", "validation_batches", "keep_checkpoints"):
            check_number(f"config.run.{name}", getattr(self, name), min=1, max=MAX_STEPS, whole=True)
        intervals = ("log", "validate", "picture", "checkpoint", "check_replicas")
        for name in (*(f"{what}_every" for what in intervals), "rollback_after"):
            check_number(f"config.run.{name}", getattr(self, name), min=1, max=MAX_STEPS, whole=True, optional=True)
        check_number("config.run.keep_every_hours", self.keep_every_hours, min=1 / 60, max=24 * 366, optional=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All settings of a run."""

    name: str  # of the model and its objective
    model: Any  # its sizes and ways of computing, the dataclass that `models.make_config` gives
    data: DataConfig  # how records become examples
    batch_size: int  # examples of an update, all processes together
    accumulate: int = 1  # microbatches of an update
    seed: int = 0
    objective: DVAEObjective | VQObjective | None = None  # of an image tokenizer
    tokenizer: str | None = None  # of models that read captions: a file, or a folder that holds one
    # Role of a model that gets no update -> workdir or exported model; each is copied into the workdir.
    frozen: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    storage: Storage = Storage()
    compression: Compression = Compression()
    run: Run

    def __post_init__(self):
        check_number("config.batch_size", self.batch_size, min=1, max=2**24, whole=True)
        check_number("config.accumulate", self.accumulate, min=1, max=self.batch_size, whole=True)
        check_number("config.seed", self.seed, min=0, max=2**32 - 1, whole=True)
        if (warmup_steps := self.optimizer.schedule.warmup_steps) > self.run.steps:
            raise UserError(
                f"expected config.optimizer.schedule.warmup_steps of at most config.run.steps = {self.run.steps}, got "
                f"{warmup_steps}, with which the step size never rises to its peak: lower it, to 0 for a short trial"
            )
        if self.ema.decay:
            check_number("config.ema.every", self.ema.every, max=self.run.steps)
        elif self.run.offload_ema:
            raise UserError(
                "expected config.ema.decay above 0 with config.run.offload_ema, got 0, with which the average is the "
                "parameters: leave one of them out"
            )
        if self.model.precision.startswith("fp16") and self.storage.params != "fp32":
            raise UserError(
                f"expected config.storage.params = fp32 with config.model.precision = {self.model.precision}, got "
                f"{self.storage.params}: gradients would be rounded a second time, to fewer bits; change one of them"
            )
        image_size = getattr(self.model, "image_size", self.data.image_size)
        if image_size != self.data.image_size:
            raise UserError(
                f"expected config.data.image_size = config.model.image_size = {image_size}, got "
                f"{self.data.image_size}: set one of them"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """The settings with these values, nested by the parts of a key.

        Raises:
          UserError: an unknown or missing key, or an impossible value.
        """
        if "run" not in values:
            raise UserError(
                f"expected the config of a model to train, such as configs/transformer.py:demo, got one of "
                f"{values.get('name')}: choose another --config"
            )
        try:
            model = make_config(values["name"], values["model"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"expected a possible config.model, got one where {error}: change it") from error
        objective, kind = values.get("objective"), OBJECTIVE_SETTINGS.get(values["name"])
        if isinstance(objective, Mapping) and kind:
            objective = _made(kind, objective, key="config.objective")
        return _made(cls, {**values, "model": model, "objective": objective}, key="config")

    def changed(self, values: Mapping[str, Any]) -> "TrainSettings":
        """The same settings with other values of some keys, e.g. {"run.steps": 100}."""
        nested = dataclasses.asdict(self)
        for key, value in values.items():
            *parts, last = key.split(".")
            place = nested
            for part in parts:
                place = place[part]
            place[last] = value
        return TrainSettings.of(nested)


def load_settings(spec: str, overrides: Sequence[str] = ()) -> TrainSettings:
    """The settings of `FILE.py:VARIANT` with overrides like `--config.model.width=128`; see `config.load`."""
    return TrainSettings.of(config.load(spec, overrides).to_dict())


def _made(kind: type, values: Mapping[str, Any], *, key: str) -> Any:
    """A dataclass of nested values."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            unknown, *known = (f"{key}.{field}".removeprefix("config.") for field in (name, *hints))
            raise UserError(f"unknown config key {unknown!r}: {config.advice(unknown, known)}")
        part = _dataclass_of(hints[name])
        if part and isinstance(value, Mapping):
            value = _made(part, value, key=f"{key}.{name}")
        elif part and value is not None and not dataclasses.is_dataclass(value):
            raise UserError(f"expected keys below {key}.{name}, got {value!r}: give {key}.{name}.KEY")
        arguments[name] = value
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"expected a possible {key}, got one where {error}: change it") from error


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in a type such as `Evaluate | None`."""
    kinds = typing.get_args(hint) or (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
