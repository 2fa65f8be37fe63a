"""The pipeline: order, shares, exact resumption, counting, and what stops a run."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import filters, transforms
from dalle_jax.data.pipeline import DataConfig, Prepare, Reading
from dalle_jax.data.record import Dropped, Record
from dalle_jax.data.share import Share
from dalle_jax.errors import UserError
from dalle_jax.layout import Layout
from tests.support.numbers_source import LAYOUT, Numbers, batches, caption, numbers_of, take
from tests.support.trees import identical

LENIENT = Reading(threads=2, max_bad_share=0.5)


class Photos(Numbers):
    """The same as JPEG of 100 x 120 pixels, smooth as photos are."""

    def __getitem__(self, i):
        coarse = Image.fromarray(super().__getitem__(i).image).resize((120, 100), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        coarse.save(file, "JPEG", quality=95)
        return Record(f"key{i}", file.getvalue(), (caption(i),))


def test_scaled_jpeg_gives_nearly_the_same_pictures_and_the_same_filters(tokenizer):
    exact = DataConfig(image_size=16, augment="center", min_image_side=100)
    scaled = dataclasses.replace(exact, scaled_jpeg=True)
    pictures = [
        np.concatenate([b["image"] for b in batches(Photos(8), tokenizer, config=config, shuffle=False, epochs=1)])
        for config in (exact, scaled)
    ]
    assert len(pictures[1]) == 8  # the filter asks for the size before scaling
    difference = np.abs(pictures[0].astype(float) - pictures[1])
    assert 0 < difference.mean() < 2
    shortest = {name: transforms.shortest(name, 256) for name in transforms.AUGMENTATIONS}
    assert shortest == {"dvae": 384, "transformer": 288, "clip": 512, "center": 512, "shift": 512}


def test_shapes(tokenizer):
    (batch,) = take(batches(Numbers(30), tokenizer), 1)
    assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (4, LAYOUT.text_len) and batch["text"].dtype == np.int32
    (batch,) = take(batches(Numbers(30), None), 1)
    assert set(batch) == {"image"}


def test_dropped_captions_are_empty_ones_at_the_configured_share(tokenizer):
    """The rest, pictures and tokens, is what a run without dropping reads; validation drops none."""
    config = DataConfig(image_size=8, augment="center", caption_dropout=0.25)
    found = take(batches(Numbers(400), tokenizer, config=config, shuffle=False, epochs=1), 100)
    plain = take(batches(Numbers(400), tokenizer, config=config.without_randomness(), shuffle=False, epochs=1), 100)
    text, whole = (np.concatenate([batch["text"] for batch in each]) for each in (found, plain))
    empty = (text == LAYOUT.caption_ids([])).all(axis=1)
    assert 0.25 - 4 * 0.022 < empty.mean() < 0.25 + 4 * 0.022  # four standard errors of a share of 400
    np.testing.assert_array_equal(text[~empty], whole[~empty])
    assert not (whole == LAYOUT.caption_ids([])).all(axis=1).any()
    np.testing.assert_array_equal(found[0]["image"], plain[0]["image"])


@pytest.mark.parametrize("processes", [1, 3])
def test_every_record_once_per_epoch_whatever_the_processes(tokenizer, processes):
    orders = []
    for index in range(processes):
        iterator = batches(Numbers(36), tokenizer, epochs=2, share=Share(index, processes))
        orders.append([i for batch in iterator for i in numbers_of(batch, tokenizer)])
    share = 36 // processes
    for epoch in range(2):
        seen = [i for order in orders for i in order[epoch * share : (epoch + 1) * share]]
        assert sorted(seen) == list(range(36))
    assert orders[0][:share] != orders[0][share:]  # a new order every epoch
    assert orders[0][:share] != sorted(orders[0][:share])


def test_what_happens_to_a_record_does_not_depend_on_the_processes(tokenizer):
    alone = take(batches(Numbers(24), tokenizer, batch_size=2), 4)
    first, second = (take(batches(Numbers(24), tokenizer, batch_size=1, share=Share(i, 2)), 4) for i in range(2))
    for name in ("image", "text"):
        together = [np.concatenate([a[name], b[name]]) for a, b in zip(first, second, strict=True)]
        np.testing.assert_array_equal(np.stack([batch[name] for batch in alone]), np.stack(together))


def test_seed_and_threads(tokenizer):
    def run(seed, threads):
        config = DataConfig(image_size=8, augment="dvae", bpe_dropout=0.1)
        return take(batches(Numbers(40), tokenizer, config=config, seed=seed, reading=Reading(threads=threads)), 5)

    identical(run(1, 0), run(1, 4))
    assert any((a["image"] != b["image"]).any() for a, b in zip(run(1, 2), run(2, 2), strict=True))


def test_crops_and_pieces_differ_between_epochs(tokenizer):
    config = DataConfig(image_size=8, augment="dvae", bpe_dropout=0.3)
    (first, second, third) = take(batches(Numbers(1), tokenizer, config=config, batch_size=8), 3)
    images, texts = (np.concatenate([first[name], second[name], third[name]]) for name in ("image", "text"))
    assert len(np.unique(images, axis=0)) > 3 and len(np.unique(texts, axis=0)) > 1


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_resume_is_exact(tokenizer, stop):
    """Stopped after any batch, with faults, several captions and dropout: what follows is bitwise the same."""
    source = Numbers(23, faults=(2, 5, 11), captions=3)
    config = DataConfig(image_size=8, augment="dvae", bpe_dropout=0.2)
    straight = batches(source, tokenizer, config=config, reading=LENIENT)
    take(straight, stop)
    state = json.loads(json.dumps(straight.get_state()))
    rest = take(straight, 12)

    resumed = batches(source, tokenizer, config=config, reading=LENIENT)
    take(resumed, 2)  # it may have been used before
    resumed.set_state(state)
    identical(take(resumed, 12), rest)
    assert resumed.get_state() == straight.get_state()
    assert (resumed.good, resumed.dropped, resumed.cut) == (straight.good, straight.dropped, straight.cut)


def test_resume_at_record_one_million_reads_nothing_before_it(tokenizer):
    source = Numbers(10_000_000)
    iterator = batches(source, tokenizer)
    state = iterator.get_state()
    state["position"] = {"next_index": 1_000_000}
    iterator.set_state(state)
    next(iterator)
    iterator.close()
    assert len(source.read) <= 64


def test_another_source_is_not_resumed(tokenizer):
    state = batches(Numbers(20), tokenizer).get_state()
    with pytest.raises(UserError, match="records = 20, got 21"):
        batches(Numbers(21), tokenizer).set_state(state)
    with pytest.raises(UserError, match="seed = 7, got 8"):
        batches(Numbers(20), tokenizer, seed=8).set_state(state)


def test_in_order_for_validation(tokenizer):
    """Not shuffled: source order, first captions, no randomness, the last batch smaller."""
    config = DataConfig(image_size=8, augment="dvae", bpe_dropout=0.5).without_randomness()
    first, second = (
        list(batches(Numbers(10, captions=3), tokenizer, config=config, shuffle=False, epochs=1, seed=seed))
        for seed in (1, 2)
    )
    assert [numbers_of(batch, tokenizer) for batch in first] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    identical(first, second)


def test_shuffled_epochs_leave_the_partial_batch_out_and_may_have_no_end(tokenizer):
    assert len(list(batches(Numbers(10), tokenizer, epochs=1))) == 2
    iterator = batches(Numbers(3), tokenizer, batch_size=5)
    assert sorted(i for batch in take(iterator, 6) for i in numbers_of(batch, tokenizer)) == sorted([0, 1, 2] * 10)


def test_one_of_several_captions_at_random(tokenizer):
    config = DataConfig(image_size=8)
    (batch,) = take(batches(Numbers(1, captions=3), tokenizer, config=config, batch_size=300), 1)
    texts, counts = np.unique(batch["text"], axis=0, return_counts=True)
    assert len(texts) == 3
    assert abs(counts / 300 - 1 / 3).max() < 5 * (2 / 9 / 300) ** 0.5  # five standard errors


def test_long_captions_are_cut_and_counted(tokenizer):
    class Long(Numbers):
        def __getitem__(self, i):
            record = super().__getitem__(i)
            return Record(
                record.key, record.image, (record.captions[0] + [" one", "漢" * 9, "x" * 999][i % 3] * 40 * (i % 2),)
            )

    config = DataConfig(image_size=8)
    iterator = batches(Long(12), tokenizer, config=config, shuffle=False, epochs=1)
    full = [bool((text[1:] < LAYOUT.text_vocab).all()) for batch in iterator for text in batch["text"]]
    assert full == [False, True] * 6
    assert (iterator.good, iterator.cut) == (12, 6)


def test_bad_and_filtered_records_are_counted_with_examples(tokenizer):
    def encoded(side, **kwargs):
        file = io.BytesIO()
        Image.new("RGB", (side, side), (9, 9, 9)).save(file, "PNG", **kwargs)
        return file.getvalue()

    class Mixed(Numbers):
        def __getitem__(self, i):
            good = super().__getitem__(i)
            kinds = {
                1: Record("cut", encoded(30)[:60], ("a",)),
                2: Dropped("lonely", "no image"),
                3: Record("mute", good.image, ()),
                4: Record("tiny", encoded(3), ("a b",)),
                5: Record("bomb", encoded(40), ("a b",)),
                6: Record("wide", good.image[:4], ("a b",)),
                7: Record("terse", good.image, ("",)),
            }
            return kinds.get(i, good)

    config = DataConfig(image_size=8, max_pixels=1000, min_image_side=4, max_aspect_ratio=2.0)
    iterator = batches(Mixed(20), tokenizer, config=config, epochs=1, batch_size=1, reading=LENIENT)
    assert sorted(i for batch in iterator for i in numbers_of(batch, tokenizer)) == [0, *range(8, 20)]
    assert iterator.good == 13
    assert iterator.dropped == {"truncated image": 1, "no image": 1, "no caption": 1, filters.TOO_SMALL: 1,
                                "decompression bomb": 1, filters.ASPECT_RATIO: 1, filters.TOO_SHORT: 1}  # fmt: skip
    assert iterator.examples["truncated image"] == ["cut"] and iterator.examples["decompression bomb"] == ["bomb"]


def test_too_many_broken_records_stop_the_run(tokenizer):
    source = Numbers(40, faults=range(0, 40, 4))
    with pytest.raises(UserError, match="at most 10% broken records in numbers, got 25%") as error:
        take(batches(source, tokenizer), 100)
    assert "10  no image  (e.g. key" in str(error.value)
    take(batches(source, tokenizer, reading=Reading(max_bad_share=0.25)), 100)


def test_filtered_records_are_not_broken(tokenizer):
    config, strict = DataConfig(image_size=8, min_caption_words=2), Reading(max_bad_share=0.0)
    iterator = batches(Numbers(13), tokenizer, config=config, epochs=1, batch_size=1, reading=strict)
    assert sorted(i for batch in iterator for i in numbers_of(batch, tokenizer)) == [10, 11, 12]
    assert iterator.dropped == {filters.TOO_SHORT: 10}


@pytest.mark.parametrize("epochs", [1, None])
def test_nothing_usable_is_an_error_and_no_endless_loop(tokenizer, epochs):
    config = DataConfig(image_size=8, min_image_side=100)
    with pytest.raises(UserError, match="at least one usable record in numbers, got none"):
        next(batches(Numbers(5), tokenizer, config=config, epochs=epochs))


def test_refusals(tokenizer):
    with pytest.raises(UserError, match="3 processes, got 2"):
        batches(Numbers(2), tokenizer, share=Share(0, 3))
    with pytest.raises(UserError, match="expected a tokenizer of at most"):
        Prepare(DataConfig(), Layout(8, 300, 2, 8), tokenizer)
