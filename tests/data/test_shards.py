"""Sharded batches: the same batches whoever reads them, and a run that goes on with another number of processes."""

import dataclasses
import json

import numpy as np
import pytest

from dalle_jax.data.pipeline import DataConfig, Prepare, Reading
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.data.share import Share
from dalle_jax.errors import UserError
from tests.support.numbers_source import LAYOUT, Numbers, batches, numbers_of, take
from tests.support.trees import identical

CONFIG = DataConfig(image_size=8, augment="transformer", bpe_dropout=0.1)
LENIENT = Reading(threads=2, max_bad_share=0.5)


def readers(source, tokenizer, count, *, shards, batch_size=8, reading=LENIENT):
    """All readers of a job; `gather` of each asks all of them, as in a real one."""
    made = []

    def gather(_):
        return [{str(shard): part.get_state() for shard, part in reader._shards.items()} for reader in made]

    for index in range(count):
        prepare = Prepare(CONFIG, LAYOUT, tokenizer)
        made.append(ShardedBatches(source, prepare, batch_size=batch_size, seed=7, shards=shards,
                                   share=Share(index, count), reading=reading, gather=gather))  # fmt: skip
    return made


def global_batches(made, count):
    """What the devices see: the parts of all readers, one after the other."""
    parts = [take(reader, count) for reader in made]
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]


def test_one_shard_is_plain_batches(tokenizer):
    source = Numbers(23, faults=(2, 5))
    (sharded,) = readers(source, tokenizer, 1, shards=None, batch_size=4)
    plain = batches(source, tokenizer, config=CONFIG, reading=LENIENT)
    identical(take(sharded, 12), take(plain, 12))
    assert sharded.get_state()["lanes"] == [plain.get_state()]
    assert (sharded.good, sharded.dropped) == (plain.good, plain.dropped)


@pytest.mark.parametrize("count", [1, 2])
def test_batches_do_not_depend_on_who_reads_the_shards(tokenizer, count):
    source = Numbers(29, faults=(2, 5, 11))
    wanted = global_batches(readers(source, tokenizer, 4, shards=4), 12)
    identical(global_batches(readers(source, tokenizer, count, shards=4), 12), wanted)


@pytest.mark.parametrize("later", [1, 2, 4])
def test_another_number_of_readers_goes_on_at_the_same_records(tokenizer, later):
    source = Numbers(29, faults=(2, 5, 11))
    first = readers(source, tokenizer, 4, shards=None)
    global_batches(first, 5)
    states = [json.dumps(reader.get_state()) for reader in first]
    assert len(set(states)) == 1
    good, dropped = sum(reader.good for reader in first), sum(reader.dropped.total() for reader in first)
    assert dropped > 0

    resumed = readers(source, tokenizer, later, shards=None if later < 4 else 4)
    for reader in resumed:
        reader.set_state(json.loads(states[0]))
    assert sum(reader.good for reader in resumed) == good
    assert sum(reader.dropped.total() for reader in resumed) == dropped
    identical(global_batches(resumed, 7), global_batches(first, 7))
    assert resumed[0].get_state() == first[0].get_state()


def test_numbers_that_do_not_fit_are_refused_with_those_that_do(tokenizer):
    source = Numbers(40)
    state = readers(source, tokenizer, 4, shards=None, batch_size=24)[0].get_state()
    (three, *_) = readers(source, tokenizer, 3, shards=None, batch_size=24)
    with pytest.raises(UserError, match=r"config.run.data.shards = 4 .* got 3 processes: use 1 or 2 or 4"):
        three.set_state(state)
    with pytest.raises(UserError, match=r"divide the batch_size of 8"):
        readers(source, tokenizer, 1, shards=3)
    (two, *_) = readers(source, tokenizer, 2, shards=2, batch_size=24)
    with pytest.raises(UserError, match=r"config.run.data.shards = 4, got 2"):
        two.set_state(state)


def test_a_shard_of_few_records_may_hold_nothing_but_broken_ones(tokenizer):
    """The share of broken records is judged over as many records as one process would judge it over."""
    source = Numbers(16, faults=(3,))
    reading = Reading(threads=0, max_bad_share=0.3)
    made = readers(source, tokenizer, 1, shards=8, reading=reading)
    seen = [i for batch in global_batches(made, 40) for i in numbers_of(batch, tokenizer)]
    assert set(seen) == set(range(16)) - {3}
    broken = readers(Numbers(16, faults=range(0, 16, 2)), tokenizer, 1, shards=8, reading=reading)
    with pytest.raises(UserError, match="at most 30% broken records"):
        global_batches(broken, 40)


class Others(Numbers):
    """As many records, with other keys."""

    def __getitem__(self, i):
        return dataclasses.replace(super().__getitem__(i), key=f"other{i}")


def test_the_same_records_under_another_name_go_on_and_others_are_refused(tokenizer):
    (before,) = readers(Numbers(24), tokenizer, 1, shards=None)
    take(before, 2)
    state = json.loads(json.dumps(before.get_state()))
    moved = Numbers(24)
    moved.name = "elsewhere"
    (after,) = readers(moved, tokenizer, 1, shards=None)
    after.set_state(state)
    identical(take(after, 2), take(before, 2))
    (other,) = readers(Others(24), tokenizer, 1, shards=None)
    with pytest.raises(UserError, match="got record 'other0' of numbers in the place of 'key0': name the same data"):
        other.set_state(state)
