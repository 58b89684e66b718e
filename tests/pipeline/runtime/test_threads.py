"""Parallel work: in order, with a bounded look-ahead, ending at the first error."""

import threading
import time
from collections.abc import Iterator

import pytest

from softshard.pipeline.runtime.threads import RESULTS_PER_THREAD, in_order


def test_results_are_in_the_order_of_the_items() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(in_order(work, range(100), 100, "work", "item")) == [number * number for number in range(100)]
    assert list(in_order(work, [], 0, "work", "item")) == []


def test_items_are_taken_as_results_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(lambda item: item, items(), 1000, "work", "item")
    for number in range(20):
        assert next(results) == number
        assert len(taken) <= number + 2 * RESULTS_PER_THREAD


@pytest.mark.parametrize("where", ["work", "items"])
def test_an_error_ends_the_work(where: str) -> None:
    done: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            if where == "items" and number == 50:
                raise ValueError("broken source")
            yield number

    def work(number: int) -> int:
        if where == "work" and number == 50:
            raise ValueError("broken item")
        done.append(number)
        return number

    threads = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        list(in_order(work, items(), 10_000, "work", "item"))
    assert len(done) < 1000
    assert threading.active_count() == threads
