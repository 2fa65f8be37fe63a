"""The token sequence: sizes of the paper, captions to ids, what is refused."""

import numpy as np
import pytest

from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT, Layout

SMALL = Layout(text_len=6, text_vocab=10, grid=2, image_vocab=7)


def test_sizes_of_the_paper():
    layout = Layout()
    assert (layout.text_len, layout.image_len, layout.length) == (256, 1024, 1280)
    assert (layout.text_vocab, layout.image_vocab) == (16_384, 8_192)
    assert layout.text_ids == 16_384 + 256  # one padding id for each text position
    assert layout.image_ids == 8_192 + 1  # and the start of image
    assert (TEXT_LOSS_WEIGHT, IMAGE_LOSS_WEIGHT) == (1 / 8, 7 / 8)


def test_captions_are_shifted_by_one_and_padded_by_an_id_for_each_position():
    ids = SMALL.caption_ids([3, 0, 9])
    np.testing.assert_array_equal(ids, [SMALL.start_of_text, 3, 0, 9, 14, 15])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(SMALL.caption_ids([]), [10, 11, 12, 13, 14, 15])


def test_special_ids_collide_with_nothing():
    padding = set(SMALL.caption_ids([]).tolist())
    assert len(padding) == SMALL.text_len
    assert min(padding) == SMALL.start_of_text == SMALL.text_vocab
    assert max(padding) == SMALL.text_ids - 1
    assert SMALL.start_of_image == SMALL.image_ids - 1 == SMALL.image_vocab


def test_long_captions_are_cut_to_what_fits():
    assert SMALL.caption_len == 5
    np.testing.assert_array_equal(SMALL.caption_ids([1, 2, 3, 4, 5, 6, 7]), [SMALL.start_of_text, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("tokens", [[10], [3, -1]])
def test_tokens_of_another_vocabulary_are_refused(tokens):
    with pytest.raises(ValueError, match="tokenizer does not belong"):
        SMALL.caption_ids(tokens)


@pytest.mark.parametrize("wrong", [{"text_len": 1}, {"text_vocab": 0}, {"grid": 0}, {"image_vocab": -1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Layout(**wrong)


def test_layouts_of_published_models():
    """minDALL-E pads with an entry of its vocabulary; Malevich marks captions, of which the end may be cut."""
    mindalle = Layout(text_len=6, text_vocab=10, grid=2, image_vocab=7, first="none", pad=4)
    assert (mindalle.caption_len, mindalle.text_ids, mindalle.image_ids, mindalle.text_slots) == (6, 10, 7, 6)
    np.testing.assert_array_equal(mindalle.caption_ids([3, 0]), [3, 0, 4, 4, 4, 4])
    np.testing.assert_array_equal(mindalle.caption_ids(range(8)), [0, 1, 2, 3, 4, 5])
    for first in ("none", "text"):
        malevich = Layout(text_len=6, text_vocab=10, grid=2, image_vocab=7, first=first, marks=(2, 3))
        before = [2] if first == "text" else []  # one more, and the last id stands at image position 0
        assert (malevich.caption_len, malevich.text_ids, malevich.image_ids) == (5, 16, 7)
        assert malevich.text_slots == 6 + len(before)
        np.testing.assert_array_equal(malevich.caption_ids([7, 8]), [*before, 2, 7, 8, 3, 14, 15])
        np.testing.assert_array_equal(malevich.caption_ids([7] * 5), [*before, 2, 7, 7, 7, 7, 7])
        assert malevich.caption_ids([]).tolist() == [*before, 2, 3, 12, 13, 14, 15]


@pytest.mark.parametrize(
    "wrong",
    [{"first": "last"}, {"first": "text"}, {"pad": 16_384}, {"pad": -1}, {"first": "none", "marks": (2, 16_384)}],
)
def test_impossible_layouts_are_refused(wrong):
    with pytest.raises(ValueError, match="first|marks|pad"):
        Layout(**wrong)
