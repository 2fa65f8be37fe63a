"""Source to batches: order, decoding, filters, augmentation, tokens, counting and exact resumption.

Grain owns the order and the worker threads: source -> shuffle -> prepare one record -> this process's share -> repeat.
Every random choice about a record comes from the generator that Grain derives from (seed, position in the global
order), so it depends neither on threads nor on the number of processes nor on where a run was resumed. A record that
cannot be used travels on as `Dropped` and is counted where batches are put together; the counts are therefore exact
and part of the state. Knows nothing of models, devices or what a batch is for.
"""

import collections
import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from dalle_jax.data import filters, transforms
from dalle_jax.data.decode import BadImage, decode_scaled
from dalle_jax.data.record import Dropped, Encoded, Source
from dalle_jax.errors import UserError
from dalle_jax.layout import Layout
from dalle_jax.text.bpe import Tokenizer, normalise

EXAMPLE_KEYS = 3  # kept for each reason, for the table that ends a bad run
CHECK_EVERY = 1000  # records between two looks at the share of broken ones; a smaller source is looked at once through


@dataclasses.dataclass(frozen=True)
class DataConfig(filters.Filters):
    """How records become examples; the filters' switches are inherited.

    image_size: pixels per side. augment: 'dvae' (listing 1), 'transformer' (listing 2), 'clip' or 'centre' (nothing
    random).
    bpe_dropout: probability of skipping a merge, 0.1 in the paper, 0 outside training.
    caption_dropout: share of records whose caption is replaced by the empty one, so that a model can be guided (Ho &
    Salimans 2021); not in the paper, 0 outside training.
    max_pixels: larger pictures are refused before they are decoded.
    scaled_jpeg: decode a JPEG at 1/2, 1/4 or 1/8 of its size where that leaves what `augment` shrinks to. Faster for
    large photos; the pixels differ a little, and random crops are drawn in larger steps. Off for the paper's pictures.
    max_bad_share: a run stops when more of the records than this are broken (filtered ones do not count).
    threads: decoding threads; 0 works in the caller's, which is fastest for pictures of a hundred pixels or less where
    nothing else waits for the caller. prefetch_batches: how far they run ahead.
    """

    image_size: int = 256
    augment: str = "centre"
    bpe_dropout: float = 0.0
    caption_dropout: float = 0.0
    max_pixels: int = 100_000_000
    scaled_jpeg: bool = False
    max_bad_share: float = 0.1
    threads: int = 4
    prefetch_batches: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.augment not in transforms.AUGMENTATIONS:
            raise ValueError(f"augment must be one of {tuple(transforms.AUGMENTATIONS)}, got {self.augment!r}")
        if self.image_size < 1 or self.threads < 0 or self.prefetch_batches < 1 or self.max_pixels < 1:
            raise ValueError("image_size, prefetch_batches and max_pixels must be at least 1 and threads at least 0")
        for name in ("bpe_dropout", "caption_dropout", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def without_randomness(self) -> "DataConfig":
        """The same records, centre crops and plain tokens: what validation reads."""
        return dataclasses.replace(self, augment="centre", bpe_dropout=0.0, caption_dropout=0.0)


@dataclasses.dataclass(frozen=True)
class Example:
    """One usable record: image uint8 [S, S, 3] or codes int32 [I], text int32 [text_len] or None; was the text cut?"""

    image: np.ndarray | None
    codes: np.ndarray | None
    text: np.ndarray | None
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Record -> Example | Dropped, all randomness from the generator; used by every thread at once."""

    config: DataConfig
    layout: Layout | None
    tokenizer: Tokenizer | None
    at_random: bool  # choose among a record's captions and its encoded crops at random, or take the first

    @functools.cached_property
    def _shortest(self) -> int:
        return transforms.shortest(self.config.augment, self.config.image_size) if self.config.scaled_jpeg else 0

    def __call__(self, record, rng: np.random.Generator) -> Example | Dropped:
        if isinstance(record, Dropped):
            return record
        if self.layout is not None and not record.captions:
            return Dropped(record.key, "no caption")
        captions = record.captions if self.layout is not None else ()
        image = codes = None
        if isinstance(record, Encoded):
            height, width = record.height, record.width
        else:
            try:
                image, (height, width) = decode_scaled(
                    record.image, shortest=self._shortest, max_pixels=self.config.max_pixels
                )
            except BadImage as error:
                return Dropped(record.key, error.reason, error.detail)
        if reason := filters.check_size(width, height, self.config):
            return Dropped(record.key, reason)
        good = filters.good_captions(captions, self.config)
        if captions and not good:
            return Dropped(record.key, filters.check_caption(captions[0], self.config))
        if image is not None:
            image = transforms.AUGMENTATIONS[self.config.augment](image, self.config.image_size, rng)
        else:
            codes = record.codes[int(rng.integers(len(record.codes))) if self.at_random else 0].astype(np.int32)
        if self.layout is None:
            return Example(image, codes, None)
        caption = good[int(rng.integers(len(good)))] if self.at_random else good[0]
        if self.config.caption_dropout and rng.random() < self.config.caption_dropout:
            return Example(image, codes, self.layout.text_slots([]))
        longest = self.tokenizer.longest_piece * self.layout.caption_len  # characters that the text slots can hold
        caption = normalise(caption)[: longest + 1]  # one too many, so that it still counts as cut
        tokens = self.tokenizer.encode(caption, dropout=self.config.bpe_dropout, rng=rng)
        return Example(image, codes, self.layout.text_slots(tokens), cut=len(tokens) > self.layout.caption_len)


class Batches:
    """Iterator over batches: {"image": uint8 [B, S, S, 3]}, or {"codes": int32 [B, I]} of a source of tokens; and,
    with a layout, "text": int32 [B, text_len].

    Attributes, all counted in records up to the last batch given out and all part of the state:
      good: records used. cut: captions that were longer than the text slots. dropped: Counter of reason -> records.
      examples: reason -> the first few keys dropped for it.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        layout: Layout | None,
        tokenizer: Tokenizer | None,
        shuffle: bool,
        epochs: int | None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`epochs` None never ends. The last batch of a finite run may be smaller, and is left out when shuffling.

        Raises:
          UserError: an empty source, fewer records than processes, or a tokenizer that is not the layout's.
        """
        if layout is not None and tokenizer is None:
            raise ValueError("a layout needs a tokenizer")
        if layout is not None and tokenizer.vocab_size > layout.text_vocab:
            raise UserError(
                f"expected a tokenizer of at most {layout.text_vocab} entries, the model's text vocabulary, "
                f"got {tokenizer.vocab_size}: use the tokenizer that the model was trained with"
            )
        if len(source) < process_count:
            raise UserError(
                f"expected at least one record for each of {process_count} processes, got {len(source)} from "
                f"{source.name}: check the source"
            )
        self._identity = {"records": len(source), "seed": seed, "shuffle": shuffle, "processes": process_count}
        self._name, self._config, self._batch_size, self._keep_partial = source.name, config, batch_size, not shuffle
        self._records = len(source)
        records = grain.MapDataset.source(source).seed(seed)
        if shuffle:
            records = records.shuffle()
        examples = records.random_map(Prepare(config, layout, tokenizer, at_random=shuffle))
        examples = examples[process_index::process_count].repeat(epochs)
        ahead = max(config.threads, config.prefetch_batches * batch_size) if config.threads else 0
        read = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead)
        self._examples = iter(examples.to_iter_dataset(read))
        self._start_counting()

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
        names = [name for name in ("image", "codes", "text") if getattr(batch[0], name) is not None]
        return {name: np.stack([getattr(example, name) for example in batch]) for name in names}

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
        """What was dropped so far, one line a reason, most frequent first."""
        lines = [f"{self.good} good records, {self.dropped.total()} dropped:"]
        for reason, count in self.dropped.most_common():
            lines.append(f"  {count:8d}  {reason}  (e.g. {', '.join(self.examples[reason])})")
        return "\n".join(lines)

    def _start_counting(self) -> None:
        self.good, self.cut = 0, 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[str]] = {}

    def _drop(self, record: Dropped) -> None:
        self.dropped[record.reason] += 1
        keys = self.examples.setdefault(record.reason, [])
        if len(keys) < EXAMPLE_KEYS and record.key not in keys:
            keys.append(record.key)

    def _stop_if_bad(self) -> None:
        seen = self.good + self.dropped.total()
        if seen >= self._records and not self.good:
            raise UserError(f"expected at least one usable record in {self._name}, got none:\n{self.table()}")
        bad = sum(count for reason, count in self.dropped.items() if reason not in filters.REASONS)
        if seen % min(CHECK_EVERY, self._records) == 0 and bad > self._config.max_bad_share * seen:
            raise UserError(
                f"expected at most {self._config.max_bad_share:.0%} broken records in {self._name}, "
                f"got {bad / seen:.0%}: mend the data or raise config.data.max_bad_share\n{self.table()}"
            )
