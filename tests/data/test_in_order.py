"""Work by threads: in order, a bounded number ahead, and over soon after an interrupt."""

import threading
import time

import pytest

from dalle_jax.data.in_order import evenly_spread, in_order


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead", [0, 3, 100])
def test_results_come_in_order_and_few_are_begun_ahead(threads, ahead):
    begun, lock = set(), threading.Lock()

    def work(item):
        with lock:
            begun.add(item)
        time.sleep(0.001 * (item % 3))
        return 2 * item

    for i, result in enumerate(in_order(work, range(40), threads=threads, ahead=ahead)):
        assert result == 2 * i and len(begun) <= i + 1 + ahead
    assert len(begun) == 40


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ValueError])
def test_what_has_not_begun_is_dropped(ending):
    done = []

    def work(item):
        done.append(item)
        time.sleep(0.01)
        if item == 2:
            raise ending
        return item

    with pytest.raises(ending):
        list(in_order(work, range(1000), threads=2, ahead=500))
    assert len(done) < 300  # a few, on a machine that is not busy


def test_numbers_are_evenly_spread():
    assert list(evenly_spread(5, None)) == list(evenly_spread(5, 9)) == [0, 1, 2, 3, 4]
    assert evenly_spread(101, 5) == [0, 25, 50, 75, 100] and evenly_spread(9, 1) == [0]
