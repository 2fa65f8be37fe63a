"""Contact sheets: every picture whole, lettered and marked."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from dalle_jax.data.sources import scenes
from dalle_jax.pictures import fonts
from dalle_jax.pictures.sheet import contact_sheet, wrap


def test_a_sheet_has_every_picture_caption_and_mark():
    source = scenes.open_scenes("train")
    images = [source[i].image for i in range(5)]
    plain = contact_sheet(images, columns=3)
    assert isinstance(plain, Image.Image) and plain.width > 3 * 128 and plain.height > 2 * 128
    pixels = np.asarray(plain)
    for image in images:
        enlarged = image.repeat(4, 0).repeat(4, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, enlarged.shape)[:, :, 0]
        rows, columns = np.nonzero((windows[:, :, ::9, ::9] == enlarged[::9, ::9]).all((2, 3, 4)))
        assert any(np.array_equal(windows[r, c], enlarged) for r, c in zip(rows, columns, strict=True))
    lettered = contact_sheet(images, ["a red circle above a blue square"] * 5, columns=3, marks=[True] * 4 + [False])
    assert lettered.height > plain.height + 2 * 13
    colors = {tuple(c) for c in np.asarray(lettered).reshape(-1, 3)}
    assert {(30, 150, 70), (205, 40, 40)} <= colors
    assert not {(30, 150, 70), (205, 40, 40)} & {tuple(c) for c in pixels.reshape(-1, 3)}


def test_a_sheet_that_cannot_be_laid_out_is_refused():
    for images, text, columns in (
        ([], None, 1),
        ([np.zeros((8, 8, 3), np.uint8)], ["a", "b"], 1),
        ([np.zeros((8, 8, 3), np.uint8)], None, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            contact_sheet(images, text, columns=columns)


def test_a_caption_is_broken_between_words_and_loses_none():
    font = ImageFont.load_default(13)
    text = "there is a large purple triangle to the left of anextremelylongwordwithoutanyspaceinit"
    lines = wrap(text, font.getlength, 100)
    assert all(font.getlength(line) <= 100 for line in lines) and len(lines) > 3
    assert lines[0].split() == text.split()[: len(lines[0].split())]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("", font.getlength, 100) == [""]


def test_letters_that_no_plain_font_has_are_drawn():
    image = np.zeros((64, 64, 3), np.uint8)
    texts = ("\u0436", "\u0434", "\u4e00", "a \u0436\u0434 b", "a \u0434\u0436 b", "a b")
    drawn = [np.asarray(contact_sheet([image], [text], columns=1)) for text in texts]
    assert len({page.tobytes() for page in drawn}) == len(texts)  # a missing letter is the same box whatever it is


def test_each_letter_has_a_font_or_is_named(monkeypatch):
    chosen, missing = fonts.fonts_for(["a \u0436\n"])
    assert len(chosen) == 1 and "DejaVuSans" in chosen[0] and not missing
    files = {"Family-Regular.ttf": "abc", "Family-Bold.ttf": "abcx", "other.ttf": "xy", "broken.ttf": ""}
    monkeypatch.setattr(fonts, "installed", lambda: iter(files))
    monkeypatch.setattr(fonts, "letters", lambda file: frozenset(files[file]))
    assert fonts.fonts_for(["abcd", "e\nx"]) == (["Family-Regular.ttf", "Family-Bold.ttf"], {"d", "e"})
