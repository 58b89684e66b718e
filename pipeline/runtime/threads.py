"""Work over many items in threads: results in order, a bounded number of them waiting, a progress bar."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

RESULTS_PER_THREAD = 16  # results waiting for each thread
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], count: int, title: str, unit: str
) -> Iterator[Result]:
    """function(item) for each item, with a progress bar on stderr.

    Unlike pool.map it takes items as it goes, so that a large data set does not pile up in memory.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        results = _submit(pool, function, items, RESULTS_PER_THREAD * threads)
        yield from tqdm(results, title, count, unit=unit, mininterval=0.5)


def _submit(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
