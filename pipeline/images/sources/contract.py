"""What every source gives: a listing first, cheaply, and then samples in a fixed order, each with a way to get its
bytes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from softshard.pipeline.runtime.errors import DataError, few

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's list
MOST_CLASSES = 1 << 20  # without a class list; far beyond any data set, and a wrong number must not fill the memory


class Sample(NamedTuple):
    """An image of the source: its key, its class, its place for messages, and how to get its bytes."""

    key: str
    label: int
    where: str
    read: Callable[[], bytes]


class Source(NamedTuple):
    """`keys` has the key of each sample, in order. `total` and `largest` are bytes; parquet files only bound them."""

    classes: list[str]
    keys: list[str]
    total: int
    largest: int
    samples: Iterator[Sample]


def numbered_classes(last: int) -> list[str]:
    """Names for the classes 0 to `last`, where nothing names them."""
    return [str(number) for number in range(min(last + 1, MOST_CLASSES))]


def check_label(label: int, classes: list[str], where: str) -> None:
    """Raise DataError unless `label` is the number of a class."""
    if not 0 <= label < len(classes):
        hint = "an unlabeled test set?" if label < 0 else "is the class list of another data set?"
        raise DataError(
            f"{where}: expected a class number from 0 to {len(classes) - 1}, found {label} ({hint}); "
            "leave the file out, or correct `classes`"
        )


def class_numbers(names: list[str], classes: list[str], expected: str) -> list[int]:
    """The class number of each name. Raises DataError, which begins with `expected`, for unknown ones."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(f"{expected}, found {quoted(unknown)}; add or remove them")
    index = {name: number for number, name in enumerate(classes)}
    return [index[name] for name in names]


def quoted(names: list[str]) -> str:
    return few([*map(repr, names)])
