"""Source to batches: order, decoding, filters, augmentation, tokens, counting and exact resumption.

Grain does the order and the worker threads: source -> shuffle -> prepare one record -> this process's share -> repeat.
Every random choice about a record comes from the generator that Grain derives from (seed, position in the global
order), so it depends neither on threads nor on the number of processes nor on where a run was resumed. A record that
cannot be used is passed on as `Dropped` and counted when batches are put together, so the counts are exact and part of
the state.
"""

import collections
import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from dalle_jax.data import filters, transforms
from dalle_jax.data.decode import MAX_PIXELS, MAX_PIXELS_LIMIT, decode_scaled
from dalle_jax.data.record import LEFT_OUT, BadRecord, Dropped, Encoded, Record, Source
from dalle_jax.data.share import WHOLE, Share
from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.layout import Layout
from dalle_jax.text import TrainingTokenizer
from dalle_jax.text.bpe import normalize
from dalle_jax.text.published import PublishedTokenizer

EXAMPLE_KEYS = 3  # kept for each reason, for the table that ends a bad run
CHECK_EVERY = 1000  # records between two checks of the share of broken ones; for a smaller source, once per epoch
NOT_BROKEN = (*filters.REASONS, *LEFT_OUT)
MAX_SIDE, MAX_THREADS, MAX_PREFETCH = 1 << 14, 1024, 1024  # more would be a slip of the keyboard


@dataclasses.dataclass(frozen=True)
class DataConfig(filters.Filters):
    """The settings that turn records into examples."""

    image_size: int = 256  # pixels per side
    augment: str = "center"  # 'dvae' (listing 1), 'transformer' (listing 2), 'clip', 'shift' or 'center' (not random)
    bpe_dropout: float = 0.0  # probability of skipping a merge of text tokens, 0.1 in the paper
    # Share of records whose caption is replaced by the empty one, so that a model can be guided (Ho & Salimans 2021);
    # not in the paper.
    caption_dropout: float = 0.0
    max_pixels: int = MAX_PIXELS  # larger images are dropped before they are decoded
    # Decode a JPEG at 1/2, 1/4 or 1/8 of its size if that leaves what `augment` shrinks to. Faster for large photos;
    # the pixels differ a little, and random crops are drawn in larger steps.
    scaled_jpeg: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("config.data.augment", self.augment, transforms.AUGMENTATIONS)
        check_number("config.data.image_size", self.image_size, min=1, max=MAX_SIDE, whole=True)
        check_number("config.data.max_pixels", self.max_pixels, min=1, max=MAX_PIXELS_LIMIT, whole=True)
        for name in ("bpe_dropout", "caption_dropout"):
            check_number(f"config.data.{name}", getattr(self, name), min=0, max=1)

    def without_randomness(self) -> "DataConfig":
        """The same records with center crops and plain tokens, for validation."""
        return dataclasses.replace(self, augment="center", bpe_dropout=0.0, caption_dropout=0.0)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings that change how fast records are read and how many may be broken, but not the batches."""

    # Threads that decode. 0 works in the caller's, which is fastest for images of at most a hundred pixels a side if
    # nothing else waits for the caller.
    threads: int = 4
    prefetch_batches: int = 2  # how far the threads run ahead
    max_bad_share: float = 0.1  # a run stops if more of the records are broken (filtered ones do not count)

    def __post_init__(self):
        check_number("config.run.data.threads", self.threads, min=0, max=MAX_THREADS, whole=True)
        check_number("config.run.data.prefetch_batches", self.prefetch_batches, min=1, max=MAX_PREFETCH, whole=True)
        check_number("config.run.data.max_bad_share", self.max_bad_share, min=0, max=1)


READING = Reading()


@dataclasses.dataclass(frozen=True)
class Example:
    """One usable record: its arrays as `Batches` documents them, without the batch dimension; was its text cut?"""

    arrays: dict[str, np.ndarray]
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Turns a record into an example, or into the reason to drop it. Used by every thread at once.

    layout, tokenizer: None if captions are not used.

    Raises:
      UserError: a tokenizer of another kind, or with more entries than the layout's text vocabulary, or dropout with
        one that has none.
    """

    config: DataConfig
    layout: Layout | None = None
    tokenizer: TrainingTokenizer | None = None

    def __post_init__(self):
        if self.layout is None:
            return
        if not isinstance(self.tokenizer, TrainingTokenizer):
            raise UserError(
                "expected a vocabulary that `dalle-jax tokenizer` trained, got "
                f"{type(self.tokenizer).__name__}: train one"
            )
        if self.config.bpe_dropout and isinstance(self.tokenizer, PublishedTokenizer):
            raise UserError(
                f"expected no BPE dropout with the text tokenizer of {self.tokenizer.family}, which has none, got "
                f"{self.config.bpe_dropout}: set --config.data.bpe_dropout=0"
            )
        if self.tokenizer.vocab_size > self.layout.text_vocab:
            raise UserError(
                f"expected a tokenizer of at most {self.layout.text_vocab} entries, the model's text vocabulary, "
                f"got {self.tokenizer.vocab_size}: use the tokenizer that the model was trained with"
            )

    def __call__(self, record, rng: np.random.Generator, *, at_random: bool) -> Example | Dropped:
        """at_random: choose among a record's captions and encoded crops at random, not the first."""
        if isinstance(record, Dropped):
            return record
        try:
            return self._example(record, rng, at_random)
        except BadRecord as bad:
            return Dropped(record.key, bad.reason, bad.detail)

    def _example(self, record: Record | Encoded, rng: np.random.Generator, at_random: bool) -> Example:
        config, layout = self.config, self.layout
        if layout is not None and not record.captions:
            raise BadRecord("no caption")
        image = None
        if isinstance(record, Encoded):
            height, width = record.height, record.width
        else:
            image, (height, width) = decode_scaled(record.image, shortest=self._shortest, max_pixels=config.max_pixels)
        given = () if layout is None and not config.of_captions else record.captions
        captions = filters.good_captions(given, width, height, config)
        if isinstance(record, Encoded):
            crop = int(rng.integers(len(record.tokens_AI))) if at_random else 0
            arrays = {"image_tokens": record.tokens_AI[crop].astype(np.int32)}
        else:
            assert image is not None
            arrays = {"image": transforms.AUGMENTATIONS[config.augment](image, config.image_size, rng)}
        if layout is None or self.tokenizer is None:
            return Example(arrays)
        caption = captions[int(rng.integers(len(captions)))] if at_random else captions[0]
        if config.caption_dropout and rng.random() < config.caption_dropout:
            return Example(arrays | {"text": layout.caption_ids([])})
        if isinstance(self.tokenizer, PublishedTokenizer):
            tokens = self.tokenizer.encode(caption)
        else:
            longest = self.tokenizer.longest_piece * layout.caption_len  # characters that the text positions can hold
            caption = normalize(caption)[: longest + 1]  # one too many, so that it still counts as cut
            tokens = self.tokenizer.encode(caption, dropout=config.bpe_dropout, rng=rng)
        return Example(arrays | {"text": layout.caption_ids(tokens)}, cut=len(tokens) > layout.caption_len)

    @functools.cached_property
    def _shortest(self) -> int:
        return transforms.shortest(self.config.augment, self.config.image_size) if self.config.scaled_jpeg else 0


class Batches:
    """Iterator over batches {"image": uint8 [B, H, W, 3]}, or {"image_tokens": int32 [B, I]} of an encoded source; with
    a layout also "text": int32 [B, T].

    Attributes, counted in records up to the last batch given out and part of the state:
      good: records used. cut: captions that were longer than the text positions. dropped: Counter of reason -> records.
      examples: reason -> the first few keys dropped for it.
    """

    def __init__(
        self,
        source: Source,
        prepare: Prepare,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        share: Share = WHOLE,
        reading: Reading = READING,
    ):
        """epochs: None never ends. The last batch of a finite run may be smaller, and is left out when shuffling.

        share: of the records, in their global order, that this reader gives out.

        Raises:
          UserError: fewer records than readers.
        """
        if len(source) < share.count:
            raise UserError(
                f"expected at least one record for each of {share.count} processes, got {len(source)} from "
                f"{source.name}: check the source"
            )
        self._identity = {"records": len(source), "seed": seed, "shuffle": shuffle, "processes": share.count}
        self._name, self._records, self._max_bad_share = source.name, len(source), reading.max_bad_share
        self._batch_size, self._keep_partial = batch_size, not shuffle
        records = grain.MapDataset.source(source).seed(seed)
        if shuffle:
            records = records.shuffle()
        examples = records.random_map(functools.partial(prepare, at_random=shuffle))[share.slice].repeat(epochs)
        ahead = max(reading.threads, reading.prefetch_batches * batch_size) if reading.threads else 0
        read = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=ahead)
        self._examples = iter(examples.to_iter_dataset(read))
        self.good, self.cut = 0, 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          StopIteration: all epochs are done.
          UserError: too many records are broken, or none can be used.
        """
        batch = []
        while len(batch) < self._batch_size:
            example = next(self._examples, None)
            if example is None:
                break
            if isinstance(example, Dropped):
                self._drop(example)
            else:
                self.good += 1
                self.cut += example.cut
                batch.append(example)
            self._stop_if_bad()
        if not batch or (len(batch) < self._batch_size and not self._keep_partial):
            raise StopIteration
        return {name: np.stack([example.arrays[name] for example in batch]) for name in batch[0].arrays}

    def get_state(self) -> dict[str, Any]:
        """Position and counts after the last batch given out; plain json."""
        return {
            "position": self._examples.get_state(),
            "identity": dict(self._identity),
            "good": self.good,
            "cut": self.cut,
            "dropped": dict(self.dropped),
            "examples": {reason: list(keys) for reason, keys in self.examples.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which the state was taken, bit for bit.

        Raises:
          UserError: the state belongs to another source, seed, order or number of processes.
        """
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"expected to resume data with {name} = {state['identity'].get(name)}, got {value} from "
                    f"{self._name}: resume with the data of the first run or start a new one"
                )
        self._examples.set_state(state["position"])
        self.good, self.cut = state["good"], state["cut"]
        self.dropped = collections.Counter(state["dropped"])
        self.examples = {reason: list(keys) for reason, keys in state["examples"].items()}

    def close(self) -> None:
        """Stops the threads."""
        self._examples.close()

    def table(self) -> str:
        """A table of the records dropped so far, one line per reason, the most frequent first."""
        lines = [f"{self.good} good records, {self.dropped.total()} dropped:"]
        for reason, count in self.dropped.most_common():
            lines.append(f"  {count:8d}  {reason}  (e.g. {', '.join(self.examples[reason])})")
        return "\n".join(lines)

    def _drop(self, record: Dropped) -> None:
        self.dropped[record.reason] += 1
        keys = self.examples.setdefault(record.reason, [])
        if len(keys) < EXAMPLE_KEYS and record.key not in keys:
            keys.append(record.key)

    def _stop_if_bad(self) -> None:
        seen = self.good + self.dropped.total()
        if seen >= self._records and not self.good:
            raise UserError(f"expected at least one usable record in {self._name}, got none:\n{self.table()}")
        bad = sum(count for reason, count in self.dropped.items() if reason not in NOT_BROKEN)
        if seen % min(CHECK_EVERY, self._records) == 0 and bad > self._max_bad_share * seen:
            raise UserError(
                f"expected at most {self._max_bad_share:.0%} broken records in {self._name}, "
                f"got {bad / seen:.0%}: mend the data or raise config.run.data.max_bad_share\n{self.table()}"
            )
