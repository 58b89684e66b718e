"""The errors a user can cause. Each message says where, what was expected, what was found, what to do."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class SoftshardError(Exception):
    """Base of the errors that the command line prints without a traceback, with exit status 2."""


class RecipeError(SoftshardError):
    """The recipe asks for something that is wrong, unknown or contradictory."""


class FormatError(SoftshardError):
    """A file is not what its name says: truncated, corrupt, of another kind or another version."""


class DataError(SoftshardError):
    """The files are sound but do not fit the work: missing samples, other images, no room."""


@contextmanager
def error_context(where: str, remedy: str) -> Iterator[None]:
    """Say where the errors raised inside happened, and what to do about damage, which is known out here alone."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{where}: {error}; {remedy}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def few(names: Sequence[str], count: int = 3) -> str:
    """'a, b, c and 4 more', for messages."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def near(name: str, known: Iterable[str]) -> str:
    """'near: a, b, c', for messages about a name that is none of those that are known; empty when none is like it."""
    matches = difflib.get_close_matches(name, list(known))
    return f"near: {', '.join(matches)}" if matches else ""
