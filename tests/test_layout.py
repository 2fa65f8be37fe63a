"""The token sequence: sizes of the paper, captions to slots and back, what is refused."""

import numpy as np
import pytest

from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT, Layout

SMALL = Layout(text_len=6, text_vocab=10, grid=2, image_vocab=7)


def test_sizes_of_the_paper():
    layout = Layout()
    assert (layout.text_len, layout.image_len, layout.length) == (256, 1024, 1280)
    assert (layout.text_vocab, layout.image_vocab) == (16_384, 8_192)
    assert layout.text_ids == 16_384 + 256  # one padding id for each text slot
    assert layout.image_ids == 8_192 + 1  # and the start of image
    assert (TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT) == (1 / 8, 7 / 8)


def test_slots_are_shifted_by_one_and_padded_each_with_its_own_id():
    slots = SMALL.text_slots([3, 0, 9])
    np.testing.assert_array_equal(slots, [SMALL.start_of_text, 3, 0, 9, 14, 15])
    assert slots.dtype == np.int32
    np.testing.assert_array_equal(SMALL.text_slots([]), [10, 11, 12, 13, 14, 15])


def test_special_ids_collide_with_nothing():
    padding = set(SMALL.text_slots([]).tolist())
    assert len(padding) == SMALL.text_len
    assert min(padding) == SMALL.start_of_text == SMALL.text_vocab
    assert max(padding) == SMALL.text_ids - 1
    assert SMALL.start_of_image == SMALL.image_ids - 1 == SMALL.image_vocab


@pytest.mark.parametrize("length", range(6))
def test_round_trip(length):
    tokens = np.random.default_rng(length).integers(SMALL.text_vocab, size=length).tolist()
    assert SMALL.caption_tokens(SMALL.text_slots(tokens)) == tokens


def test_long_captions_are_cut_to_what_fits():
    assert SMALL.caption_len == 5
    assert SMALL.caption_tokens(SMALL.text_slots([1, 2, 3, 4, 5, 6, 7])) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tokens", [[10], [3, -1]])
def test_tokens_of_another_vocabulary_are_refused(tokens):
    with pytest.raises(ValueError, match="tokenizer does not belong"):
        SMALL.text_slots(tokens)


@pytest.mark.parametrize("wrong", [{"text_len": 1}, {"text_vocab": 0}, {"grid": 0}, {"image_vocab": -1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Layout(**wrong)
