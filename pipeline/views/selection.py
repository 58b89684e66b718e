"""The numbers of views as a command line names them: `0,3,5-6`."""

import re

from softshard.pipeline.runtime.errors import RecipeError


def view_ranges(text: str, count: int) -> list[range]:
    """'0,3,5-6' -> [range(0, 1), range(3, 4), range(5, 7)], in the order of the text.

    Raises:
        RecipeError: for other texts, ranges that go down, and numbers that are not below `count`.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        if not match:
            raise RecipeError(f"--views: expected numbers and ranges such as 0,3,5-6, found {part!r} in {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"--views: expected ranges that go up, found {part.strip()}; write {last}-{first}")
        check_view(last, count)
        ranges.append(range(first, last + 1))
    return ranges


def check_view(view: int, count: int) -> None:
    """Raises RecipeError for the number of a view that is not below `count`."""
    if view >= count:
        raise RecipeError(
            f"--views: expected numbers from 0 to {count - 1}, as views.count says, found {view}; correct one"
        )
