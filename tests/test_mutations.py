"""The mutations fit the tree; `.ci/run --slow` makes them."""

from tests.mutations import MUTATIONS, misfits


def test_every_row_stands_exactly_once_in_its_file():
    assert not misfits([(file, tests, *pair) for file, tests, pairs in MUTATIONS for pair in pairs])
