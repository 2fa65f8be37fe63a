"""Decoding: every kind of image becomes RGB or has a reason; JPEG by libjpeg-turbo has the bits that Pillow gives."""

import collections
import io
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import decode
from dalle_jax.serve import uploads
from tests.support.broken_shards import encoded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged headers

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


def test_decode_gives_upright_opaque_rgb():
    def decoded(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        pixels = decode.decode_image(out.getvalue())
        np.testing.assert_array_equal(decode.to_pixels(Image.open(out)), pixels)
        return pixels

    red, blue = (255, 0, 0), (0, 0, 255)
    wide = Image.new("RGB", (4, 2), red)
    wide.paste(blue, (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the left half becomes the upper one
    turned = decoded(wide, "PNG", exif=exif)
    assert turned.shape == (4, 2, 3) and tuple(turned[0, 0]) == blue and tuple(turned[-1, -1]) == red
    assert tuple(decoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")[0, 0]) == (255, 255, 255)
    assert tuple(decoded(Image.new("LA", (2, 2), (0, 128)), "PNG")[0, 0]) == (127, 127, 127)
    assert tuple(decoded(Image.new("1", (2, 2), 1), "PNG")[0, 0]) == (255, 255, 255)
    assert tuple(decoded(wide.quantize(2), "PNG")[0, 0]) == blue
    assert tuple(decoded(Image.fromarray(np.full((2, 2), 25700, np.uint16)), "PNG")[0, 0]) == (100, 100, 100)
    frames = [Image.new("RGB", (2, 2), red), Image.new("RGB", (2, 2), blue)]
    assert tuple(decoded(frames[0], "GIF", save_all=True, append_images=frames[1:])[0, 0]) == red
    cyan = decoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")[0, 0].astype(int)
    assert np.abs(cyan - (0, 255, 255)).max() < 8
    with pytest.raises(decode.BadImage, match="unsupported image"):
        decoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(decode.BadImage, match="unsupported image"):
        decode.to_pixels(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright_and_only_once(kind, orientation):
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    wide = picture(24, 16).resize((48, 32), Image.Resampling.NEAREST)
    exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    wide.save(out, kind, exif=exif, **exact)
    pixels = decode.decode_image(out.getvalue()).astype(int)
    whole = np.asarray(wide).astype(int)
    flipped = {2: whole[:, ::-1], 3: whole[::-1, ::-1], 4: whole[::-1]}.get(orientation, whole)
    turned = whole.transpose(1, 0, 2)  # 5; the others mirror it
    turned = {6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}.get(orientation, turned)
    wanted = turned if orientation in (5, 6, 7, 8) else flipped
    assert pixels.shape == wanted.shape and np.abs(pixels - wanted).mean() < 3  # of JPEG
    once = decode.upright(Image.open(out))
    assert np.array_equal(np.asarray(decode.upright(once)), np.asarray(once))


@pytest.mark.parametrize("block", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12"])
def test_a_png_with_a_broken_exif_block_keeps_its_pixels(block):
    out, whole = io.BytesIO(), picture(8, 8)
    whole.save(out, "PNG", exif=block)
    np.testing.assert_array_equal(decode.decode_image(out.getvalue()), np.asarray(whole))
    np.testing.assert_array_equal(decode.to_pixels(Image.open(out)), np.asarray(whole))
    np.testing.assert_array_equal(uploads.read_image(out.getvalue(), param="image"), np.asarray(whole))


@pytest.mark.parametrize(
    ("shortest", "shape"), [(0, (400, 600)), (201, (400, 600)), (200, (200, 300)), (99, (100, 150)), (1, (50, 75))]
)
def test_scaled_decoding_leaves_the_shorter_side_that_is_needed(shortest, shape):
    smooth = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    data = jpeg(Image.fromarray(smooth).resize((600, 400), Image.Resampling.BICUBIC), quality=95)
    pixels, size = decode.decode_scaled(data, shortest=shortest)
    assert pixels.shape == (*shape, 3) and size == (400, 600)
    scale = 400 // shape[0]
    averages = decode.decode_image(data).reshape(shape[0], scale, shape[1], scale, 3).mean((1, 3))
    assert np.abs(averages - pixels).mean() < 1.0  # nearly the average of each square; unscaled it is the same
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels, size = decode.decode_scaled(jpeg(Image.open(io.BytesIO(data)), exif=turned, quality=95), shortest=shortest)
    assert pixels.shape == (shape[1], shape[0], 3) and size == (600, 400)


def test_only_jpeg_is_decoded_scaled():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    for kind in ("PNG", "WEBP", "GIF"):
        out = io.BytesIO()
        image.save(out, kind)
        pixels, size = decode.decode_scaled(out.getvalue(), shortest=8)
        assert np.array_equal(pixels, decode.decode_image(out.getvalue())) and size == (64, 64)


def test_decode_takes_arrays():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(decode.decode_image(array), array)
    assert np.array_equal(decode.decode_image(array[..., :1]), np.repeat(array[..., :1], 3, axis=2))
    for wrong in (array.astype(np.float32), array[0], array[:0]):
        with pytest.raises(decode.BadImage, match="unsupported image"):
            decode.decode_image(wrong)
    with pytest.raises(decode.BadImage, match="decompression bomb"):
        decode.decode_image(array, max_pixels=7)


@pytest.mark.parametrize("cut", [0, 1, 2, 20, 100, 300, 1000])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_images_have_a_reason(kind, cut):
    whole = encoded(kind=kind)
    assert decode.decode_image(whole).shape == (32, 48, 3)
    with pytest.raises(decode.BadImage) as error:
        decode.decode_image(whole[:cut])
    expected = {"zero bytes"} if not cut else {"not an image", "truncated image", "broken image"}
    assert error.value.reason in expected
