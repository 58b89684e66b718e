"""Intervals of time: what their union covers, and what two sets of them have in common."""

from collections.abc import Iterable

Interval = tuple[float, float]  # from, to


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of some intervals, as intervals that neither overlap nor touch, in order. Empty ones add nothing."""
    union: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def covered(intervals: Iterable[Interval]) -> float:
    """How much time at least one of the intervals covers."""
    return sum(end - start for start, end in merged(intervals))


def overlap(some: Iterable[Interval], others: Iterable[Interval]) -> float:
    """How much time both sets cover."""
    left, right = merged(some), merged(others)
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return total
