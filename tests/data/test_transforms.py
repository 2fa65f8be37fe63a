"""The augmentations against the formulas of the paper's two listings, and the area average against exact integrals."""

import collections
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import transforms


def coordinates(height, width, *, step=1):
    """A picture whose red is the row and green the column, so that a window can be found again."""
    rows, columns = np.mgrid[0:height, 0:width] * step
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def exact_average(image, side):
    """Integral of the piecewise constant picture over every output pixel, weights as fractions, edges repeated."""
    length = len(image)
    ratio = Fraction(length - 1, side - 1)
    weights = np.zeros((side, length), object)
    for i in range(side):
        begin, end = i * ratio, (i + 1) * ratio
        for pixel in range(int(begin), int(end) + 1):
            weights[i, min(pixel, length - 1)] += max(Fraction(0), min(end, pixel + 1) - max(begin, pixel)) / ratio
    assert (weights.sum(axis=1) == 1).all()
    weights = weights.astype(np.float64)
    return np.einsum("ir,rcx,jc->ijx", weights, image.astype(np.float64), weights, optimize=True)


def assert_uniform(draws, support):
    """Every value of the support within five standard errors of its share, and nothing else."""
    counts = collections.Counter(draws)
    assert set(counts) == set(support)
    share = 1 / len(support)
    tolerance = 5 * (share * (1 - share) / len(draws)) ** 0.5
    assert max(abs(counts[value] / len(draws) - share) for value in support) <= tolerance


@pytest.mark.parametrize(("length", "side"), [(17, 17), (10, 9), (16, 9), (23, 5), (40, 7), (64, 2)])
def test_area_average_is_exact(length, side):
    image = np.random.default_rng(length).integers(0, 256, (length, length, 3), np.uint8)
    out = transforms.shrink_by_area(image, side)
    assert out.dtype == np.uint8
    assert np.abs(out - exact_average(image, side)).max() < 0.5 + 1e-3  # rounding to nearest, float32 sums


def test_area_window_is_a_cut_of_the_whole():
    image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), np.uint8)
    whole = transforms.shrink_by_area(image, 20)
    np.testing.assert_array_equal(transforms.shrink_by_area(image, 20, top=3, left=5, size=12), whole[3:15, 5:17])


@pytest.mark.parametrize("name", transforms.AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 40), (33, 21), (64, 64), (1, 1), (200, 31)])
def test_shape_and_plain_pictures(name, height, width):
    """A plain color stays exactly that color, whatever is cropped and resized."""
    image = np.full((height, width, 3), (3, 128, 255), np.uint8)
    out = transforms.AUGMENTATIONS[name](image, 16, np.random.default_rng(0))
    assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert (out == (3, 128, 255)).all()
    image = np.random.default_rng(1).integers(0, 256, image.shape, np.uint8)
    first, second = (transforms.AUGMENTATIONS[name](image, 16, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # all randomness is the generator's


def test_dvae_square_is_uniform_and_flips_half():
    """Listing 1 where nothing needs resizing: 8 x 20 pixels to 8 x 8, offsets 0 .. 12, both ends included."""
    rng, image = np.random.default_rng(0), coordinates(8, 20)
    crops = [transforms.augment_dvae(image, 8, rng) for _ in range(3000)]
    flipped = [bool(crop[0, 0, 1] > crop[0, 7, 1]) for crop in crops]
    assert_uniform([int(crop[0, :, 1].min()) for crop in crops], range(13))
    assert_uniform(flipped, (False, True))


@pytest.mark.parametrize(
    ("height", "width", "offsets"), [(8, 28, range(7, 12)), (8, 9, [0]), (8, 8, [0]), (8, 16, range(3, 5))]
)
def test_transformer_square_is_central_and_never_flips(height, width, offsets):
    """Listing 2: offsets from floor(3 slack / 8) up to max(first + 1, floor(5 slack / 8)), the end excluded."""
    rng, image = np.random.default_rng(0), coordinates(height, width)
    for picture, axis in ((image, 1), (image.transpose(1, 0, 2)[..., [1, 0, 2]], 0)):
        crops = [transforms.augment_transformer(picture, 8, rng) for _ in range(1500)]
        assert_uniform([int(crop[0, 0, axis]) for crop in crops], offsets)
        assert all((np.diff(crop[:, :, axis].astype(int), axis=axis) == 1).all() for crop in crops)


@pytest.mark.parametrize(("name", "sides"), [("dvae", range(18, 25)), ("transformer", range(16, 19))])
def test_resized_side_and_window_are_uniform(name, sides):
    """64 x 64 to 16: side t uniform in the listing's range, then the window uniform in 0 .. t - 16 on both axes."""
    image = coordinates(64, 64, step=4)
    window_of = {}
    for side in sides:
        whole = np.round(exact_average(image, side)).astype(int)
        for top in range(side - 15):
            for left in range(side - 15):
                window_of[whole[top, left, 0], whole[top + 15, left, 0], whole[top, left, 1]] = side, top, left
    rng, found = np.random.default_rng(0), []
    for _ in range(3000):
        crop = transforms.AUGMENTATIONS[name](image, 16, rng)
        found.append(window_of[int(crop[0, 0, 0]), int(crop[15, 0, 0]), int(crop[0, :, 1].min())])
    assert_uniform([side for side, _, _ in found], sides)
    for axis in (1, 2):
        assert_uniform([window[axis] for window in found if window[0] == sides[-1]], range(sides[-1] - 15))


@pytest.mark.parametrize(("name", "shortest", "longest"), [("dvae", 288, 384), ("transformer", 256, 288)])
def test_the_papers_sizes(monkeypatch, name, shortest, longest):
    seen = []

    def shrink(image, side, *, top, left, size):
        seen.append(side)
        return image[:size, :size]

    monkeypatch.setattr(transforms, "shrink_by_area", shrink)
    rng, image = np.random.default_rng(0), np.zeros((500, 600, 3), np.uint8)
    for _ in range(3000):
        transforms.AUGMENTATIONS[name](image, 256, rng)
    assert (min(seen), max(seen)) == (shortest, longest)
    seen.clear()
    transforms.AUGMENTATIONS[name](image[:270, :270], 256, rng)
    assert seen[0] == 270 if name == "dvae" else 256 <= seen[0] <= 270


def test_shifts_are_uniform_and_repeat_the_edge():
    """At 64 pixels each offset of -3 .. 3 on both axes, and mirrored half of the time."""
    rng, image = np.random.default_rng(0), coordinates(64, 64)
    found = collections.Counter()
    for _ in range(3000):
        crop = transforms.AUGMENTATIONS["shift"](image, 64, rng)
        mirrored = bool(crop[0, 0, 1] > crop[0, 63, 1])
        crop = crop[:, ::-1] if mirrored else crop
        down, across = int(crop[32, 0, 0]) - 32, int(crop[0, 32, 1]) - 32
        found[down, across, mirrored] += 1
        places = np.arange(64)
        np.testing.assert_array_equal(crop[:, 0, 0], (places + down).clip(0, 63))
        np.testing.assert_array_equal(crop[0, :, 1], (places + across).clip(0, 63))
    assert_uniform(
        list(found.elements()), [(d, a, m) for d in range(-3, 4) for a in range(-3, 4) for m in (False, True)]
    )


def lanczos(image, height, width):
    """Pillow's resampling by its definition: rows and columns, each rounded to whole levels, windows of 3 / scale."""

    def line(length, wanted):
        scale = max(1.0, length / wanted)
        weights = np.zeros((wanted, length))
        for i in range(wanted):
            center = (i + 0.5) * length / wanted
            low, high = max(0, int(center - 3 * scale + 0.5)), min(length, int(center + 3 * scale + 0.5))
            x = (np.arange(low, high) + 0.5 - center) / scale
            weights[i, low:high] = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
        return weights / weights.sum(axis=1, keepdims=True)

    across = np.einsum("rcx,jc->rjx", image.astype(float), line(image.shape[1], width))
    across = np.floor(across.clip(0, 255) + 0.5)
    return np.floor(np.einsum("rjx,ir->ijx", across, line(image.shape[0], height)).clip(0, 255) + 0.5)


@pytest.mark.parametrize(
    ("height", "width"), [(30, 40), (40, 30), (17, 49), (33, 32), (21, 64), (16, 37), (9, 14), (24, 24)]
)
def test_center_is_the_released_notebooks_preprocessing(height, width):
    """notebooks/usage.ipynb of openai/DALL-E: with r = target / min(size), a resize to (round(r h), round(r w)) by
    Lanczos, then torchvision's center_crop, which begins at int(round((length - size) / 2))."""
    image, size = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8), 16
    ratio = size / min(height, width)
    tall, wide = round(ratio * height), round(ratio * width)
    top, left = int(round((tall - size) / 2.0)), int(round((wide - size) / 2.0))
    wanted = lanczos(image, tall, wide)[top : top + size, left : left + size]
    assert np.abs(transforms.center_crop(image, size) - wanted).max() <= 1  # Pillow's weights have 22 bits


def test_center_of_a_picture_that_needs_no_resizing():
    out = transforms.center_crop(coordinates(8, 21), 8)  # 6.5 columns on each side: rounded to the even number
    np.testing.assert_array_equal(out[0, :, 1], np.arange(6, 14))
    np.testing.assert_array_equal(out[:, 0, 0], np.arange(8))


@pytest.mark.parametrize("name", ["center", "clip"])
def test_a_picture_of_the_size_wanted_is_copied_as_pillow_does(name):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = transforms.AUGMENTATIONS[name](image, 16, np.random.default_rng(0))
    for filter_ in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC):
        np.testing.assert_array_equal(out, np.asarray(Image.fromarray(image).resize((16, 16), filter_)))
    assert not np.shares_memory(out, image) and out.flags.c_contiguous
