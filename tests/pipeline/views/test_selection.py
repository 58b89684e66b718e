"""`--views`: one grammar for all commands."""

import pytest

from softshard.pipeline.runtime.errors import RecipeError
from softshard.pipeline.views.selection import view_ranges


def test_numbers_and_ranges_in_the_order_of_the_text() -> None:
    assert view_ranges("0,3,5-6, 7 - 7 ", 8) == [range(1), range(3, 4), range(5, 7), range(7, 8)]
    assert view_ranges("3,0-1,3", 8) == [range(3, 4), range(2), range(3, 4)]
    assert view_ranges(f"0-{10**15}", 10**16) == [range(10**15 + 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "--views: expected numbers from 0 to 2, as views.count says, found 3; correct one"),
        ("0-3", "--views: expected numbers from 0 to 2, as views.count says, found 3; correct one"),
        ("2-1", "--views: expected ranges that go up, found 2-1; write 1-2"),
        ("0,x", "--views: expected numbers and ranges such as 0,3,5-6, found 'x' in '0,x'"),
        ("-1", "--views: expected numbers and ranges such as 0,3,5-6, found '-1' in '-1'"),
        ("", "--views: expected numbers and ranges such as 0,3,5-6, found '' in ''"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        view_ranges(text, 3)
    assert str(error.value) == message
