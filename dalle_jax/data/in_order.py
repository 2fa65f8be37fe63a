"""Records read and worked on by several threads, in order, a bounded number ahead."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None, ahead: int
) -> Iterator[Result]:
    """function(item) of each item, in order, by threads that begin at most `ahead` items before they are asked for.

    threads: None takes as many as `ThreadPoolExecutor` does. However the loop ends, with an interrupt too, what has not
    begun is dropped.
    """
    pool, waiting = futures.ThreadPoolExecutor(threads), collections.deque[futures.Future[Any]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def evenly_spread(count: int, limit: int | None) -> Sequence[int]:
    """0 .. count - 1, or `limit` of these numbers, evenly spread, with the first and the last."""
    if limit is None or limit >= count:
        return range(count)
    return np.linspace(0, count - 1, limit).astype(int).tolist()
