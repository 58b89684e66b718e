import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from gpu_stages.pipeline.overlap import covered, merged, overlap


def cells(intervals: Iterable[Any]) -> set[int]:
    """The same by brute force: which unit cells they cover."""
    return {cell for start, end in intervals for cell in range(start, end)}


@pytest.mark.parametrize("seed", range(50))
def test_intervals_are_sets_of_moments(seed: int) -> None:
    draw = random.Random(seed)
    some, others = (
        [(start, start + draw.randrange(0, 6)) for start in draw.choices(range(40), k=draw.randrange(8))]
        for _ in range(2)
    )
    assert covered(some) == len(cells(some))
    assert overlap(some, others) == overlap(others, some) == len(cells(some) & cells(others))
    union = merged(some)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(union))
    assert cells(union) == cells(some)


def test_touching_intervals_are_one() -> None:
    assert merged([(3.0, 4.0), (1.0, 2.0), (2.0, 3.0), (5.0, 5.0)]) == [(1.0, 4.0)]
    assert overlap([(0.0, 1.0)], [(1.0, 2.0)]) == 0.0
    assert covered([]) == overlap([], [(0.0, 1.0)]) == 0.0
