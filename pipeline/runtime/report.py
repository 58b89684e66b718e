"""What a check gives: `verify` of files, `spot_check` of labels."""

from typing import NamedTuple


class Report(NamedTuple):
    """What was checked, for people, and one line for each thing that is not whole."""

    checked: str
    problems: list[str]
