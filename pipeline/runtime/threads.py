"""Work over many items in threads: results in order, a bounded number of them waiting, a progress bar."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

WAITING_RESULTS_PER_THREAD = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], count: int, title: str, unit: str
) -> Iterator[Result]:
    """function(item) for each item, in order, with a progress bar on stderr.

    Unlike pool.map it takes items as it goes, so that a large data set does not pile up in memory.

    Args:
        function: Called in threads.
        items: Taken in the calling thread.
        count: How many items there are, for the bar.
        title: What the bar says before its figures.
        unit: What the bar calls an item.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        results = _submit(pool, function, items, WAITING_RESULTS_PER_THREAD * threads)
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
