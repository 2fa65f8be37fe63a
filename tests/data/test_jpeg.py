"""JPEG by libjpeg-turbo straight into an array: the bits, the refusals and the sizes of Pillow's decoder."""

import collections
import io
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import decode

FORMS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0, progressive": {"subsampling": 2, "progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "quality 100": {"quality": 100, "optimize": True},
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Slopes, edges and colors."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([5 * x + y, 255 * (x // 7 % 2 == y // 5 % 2), x * y], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **values) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **values)
    return file.getvalue()


def outcome(image: bytes, shortest: int):
    """Pixels and the size before scaling, or the reason of a refusal."""
    try:
        return decode.decode_scaled(image, shortest=shortest, max_pixels=10_000)
    except decode.BadImage as error:
        return error.reason


def with_pillow(image: bytes, shortest: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_jpeg_pixels", lambda opened, image: None)
        return outcome(image, shortest)


def assert_same(image: bytes, shortest: int):
    ours, pillow = outcome(image, shortest), with_pillow(image, shortest)
    if isinstance(pillow, str):
        assert ours == pillow
    else:
        np.testing.assert_array_equal(ours[0], pillow[0])
        assert ours[1] == pillow[1]
    return pillow if isinstance(pillow, str) else "good"


@pytest.fixture
def fast(monkeypatch):
    """How often the direct decoder gave pixels, and how often it left them to Pillow."""
    counts, decoder = collections.Counter(), decode._jpeg_pixels

    def counted(opened, image):
        pixels = decoder(opened, image)
        counts[pixels is not None] += 1
        return pixels

    monkeypatch.setattr(decode, "_jpeg_pixels", counted)
    return counts


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shortest", [0, 8, 20, 31])
def test_bits_are_those_of_pillow(fast, form, mode, shortest):
    for size in ((64, 48), (61, 47), (33, 80), (8, 8), (1, 1)):
        assert assert_same(jpeg(picture(*size, mode), **FORMS[form]), shortest) == "good"
    assert fast == {True: 5}


def test_what_is_not_plain_is_left_to_pillow(fast):
    turned = picture(40, 30)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert assert_same(jpeg(turned, exif=exif), 0) == "good"
    assert outcome(jpeg(turned, exif=exif), 0)[0].shape == (40, 30, 3)
    assert assert_same(jpeg(picture(40, 30, "CMYK")), 0) == "good"
    assert True not in fast


def test_damage_has_the_outcome_that_pillow_gives():
    rng, wholes = np.random.default_rng(0), [jpeg(picture(40, 30), **values) for values in FORMS.values()]
    outcomes = collections.Counter()
    for i in range(600):
        image = bytearray(wholes[i % len(wholes)])
        if i % 3 == 0:
            image = image[: rng.integers(len(image))]
        else:
            for place in rng.integers(len(image), size=4):
                image[place] = rng.integers(256)
        outcomes[assert_same(bytes(image), int(rng.choice([0, 10])))] += 1
    assert min(outcomes[reason] for reason in ("good", "truncated image", "broken image")) >= 10


def test_no_more_than_the_checked_size_is_decoded():
    """Of a file whose frame is larger than its header seemed to say: refused before pixels have room."""
    seemed = types.SimpleNamespace(format="JPEG", mode="RGB", height=8, width=8, getexif=dict)
    large = jpeg(picture(2000, 2000))
    tracemalloc.start()
    assert decode._jpeg_pixels(seemed, large) is None
    assert tracemalloc.get_traced_memory()[1] < 10_000  # 8 x 8 pixels and an exception; an eighth has 187,500 bytes
    tracemalloc.stop()


def test_two_frames_have_the_outcome_that_pillow_gives():
    small, large = jpeg(picture(8, 8)), jpeg(picture(60, 60))
    frames = [image[image.index(b"\xff\xc0") :][:19] for image in (small, large)]
    assert all(int.from_bytes(frame[2:4]) == 17 for frame in frames)
    for order in (frames, frames[::-1]):
        for image, frame in zip((small, large), frames, strict=True):
            assert assert_same(image.replace(frame, b"".join(order)), 0) != "good"
