"""The pattern against a second, independent reading of the paper: loops over positions, no code shared with it."""

import numpy as np
import pytest

from dalle_jax.attention_pattern import KINDS, allowed, allowed_image, image_offsets, layer_kinds

PAPER_GRID, PAPER_TEXT = 32, 256


def image_keys(kind: str, query: int, grid: int) -> set[int]:
    """Image keys that image position `query` may see, position by position as section 2.2 and figure 11 say."""
    keys = set()
    for key in range(query + 1):  # causal, itself included
        back = query - key
        if kind == "full":
            keys.add(key)
        elif kind == "row" and back <= grid:  # the last grid positions: farthest is the same column one row up
            keys.add(key)
        elif kind == "column" and back % grid == 0:
            keys.add(key)
        elif kind == "conv":
            for rows_up in range(6):
                for columns in range(-5, 6):  # positive: to the left
                    if (rows_up > 0 or columns >= 0) and back == rows_up * grid + columns:
                        keys.add(key)
        elif kind in ("window", "torus") and query in drawn_around(key, grid, wrapped=kind == "torus"):
            keys.add(key)
    return keys


def drawn_around(key: int, grid: int, *, wrapped: bool) -> set[int]:
    """Positions within five rows and columns of one, as the authors of Malevich draw them, cell by cell."""
    cells = set()
    for down in range(-5, 6):
        for right in range(-5, 6):
            row, column = key // grid + down, key % grid + right
            if wrapped:
                row, column = row % grid, column % grid
            if 0 <= row < grid and 0 <= column < grid:
                cells.add(row * grid + column)
    return cells


def brute_force(kind: str, *, text_len: int, grid: int) -> np.ndarray:
    length = text_len + grid * grid
    mask = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(length):
            if query < text_len:
                mask[query, key] = key <= query  # text never sees the image: its keys come later
            elif key < text_len:
                mask[query, key] = True
            else:
                mask[query, key] = key - text_len in image_keys(kind, query - text_len, grid)
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), [(0, 1), (3, 2), (5, 4), (2, 7)])
def test_allowed_equals_brute_force(kind, text_len, grid):
    np.testing.assert_array_equal(
        allowed(kind, text_len=text_len, grid=grid), brute_force(kind, text_len=text_len, grid=grid)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_allowed_equals_brute_force_on_the_papers_grid(kind):
    mask = allowed(kind, text_len=0, grid=PAPER_GRID)
    # Corners, borders and a spread of inner positions of the 32 x 32 grid; all 1024 would take seconds.
    for query in {*range(0, 1024, 13), *range(70), *range(31, 1024, 32), *range(160, 1024, 32), *range(954, 1024)}:
        assert set(np.flatnonzero(mask[query])) == image_keys(kind, query, PAPER_GRID), query


@pytest.mark.parametrize(
    ("kind", "most", "pairs"),
    [("row", 33, 33_264), ("column", 32, 16_896), ("conv", 61, 57_169), ("full", 1024, 524_800)],
)
def test_keys_per_query(kind, most, pairs):
    keys = allowed_image(kind, grid=PAPER_GRID).sum(1)
    assert keys.max() == most == len(image_offsets(kind, grid=PAPER_GRID))
    assert keys.sum() == pairs
    means = {"row": 32.5, "column": 16.5, "conv": 55.8, "full": 512.5}
    assert keys.mean() == pytest.approx(means[kind], abs=0.05)


@pytest.mark.parametrize(
    ("kind", "pairs"), [("full", 819_840), ("row", 328_304), ("column", 311_936), ("conv", 352_209)]
)
def test_pairs_of_the_papers_sequence(kind, pairs):
    assert allowed(kind, text_len=PAPER_TEXT, grid=PAPER_GRID).sum() == pairs


def test_row_extent_is_five_on_the_four_by_four_grid_of_figure_11():
    keys = allowed_image("row", grid=4)
    assert keys[15].sum() == keys[4].sum() == 5
    assert keys[4, 0] and not keys[5, 0]  # the farthest key is in the query's own column, one row up


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_sees_itself_and_nobody_the_future(kind):
    mask = allowed(kind, text_len=3, grid=5)
    assert mask.diagonal().all()
    assert not np.triu(mask, 1).any()


def test_layer_kinds_of_the_paper():
    kinds = layer_kinds(64)
    assert {kind: kinds.count(kind) for kind in KINDS} == {
        "row": 47, "column": 16, "conv": 1, "window": 0, "torus": 0, "full": 0
    }  # fmt: skip
    for i, kind in enumerate(kinds, 1):  # appendix B.1 counts layers from 1
        assert kind == ("conv" if i == 64 else "column" if (i - 2) % 4 == 0 else "row")


def test_layer_kinds_of_small_models():
    assert layer_kinds(1) == ("conv",)
    assert layer_kinds(4) == ("row", "column", "row", "conv")
    assert layer_kinds(6) == ("row", "column", "row", "row", "row", "conv")  # layer 6 would be column, were it not last
    assert layer_kinds(3, "full") == ("full", "full", "full")


def test_layer_kinds_of_malevich():
    assert layer_kinds(24, "malevich") == layer_kinds(24)[:-1] + ("window",)
    assert layer_kinds(24, "malevich-v2") == layer_kinds(24)[:-1] + ("torus",)
    assert layer_kinds(6, "malevich")[-1] == "column"  # in the original's code the last layer is one before all else


def test_masks_of_malevich_have_the_originals_sums():
    sums = [allowed(kind, text_len=8, grid=12).sum() for kind in ("row", "column", "window", "torus")]
    assert sums == [2982, 2124, 6462, 9972]


def test_the_shared_mask_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        allowed_image("row", grid=3)[0, 0] = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_kinds(0), "num_layers"),
        (lambda: layer_kinds(4, "rows"), "pattern"),
        (lambda: allowed("diagonal", text_len=1, grid=2), "kind"),
        (lambda: allowed("row", text_len=-1, grid=2), "text_len"),
        (lambda: allowed("row", text_len=1, grid=0), "grid"),
        (lambda: image_offsets("rows", grid=4), "kind"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
