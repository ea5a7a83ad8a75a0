"""Prefetching in threads, with a bound on the number of waiting results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, depth: int
) -> Iterator[Iterator[Result]]:
    """Results of `function` in the order of `items`, computed in threads while earlier results are used.

    At most `depth` results are waiting or being computed, so memory does not grow with the number of items. An error of
    `function` is raised when its result is read. Leaving the context cancels calls that have not started.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        yield _in_order(pool, function, iter(items), depth)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], depth: int
) -> Iterator[Result]:
    started: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(items, depth))
    while started:
        result = started.popleft().result()
        started.extend(pool.submit(function, item) for item in islice(items, 1))
        yield result
