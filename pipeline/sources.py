"""Where images come from: class folders, WebDataset tars, parquet files of the Hugging Face hub.

A source lists its keys first, cheaply, and then gives samples in a fixed order, each with a way to get its bytes.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from braceexpand import braceexpand
from tqdm import tqdm

from pipeline.errors import DataError, few
from pipeline.recipe import ColumnsRecipe, SourceRecipe
from pipeline.tars import tar_images

if TYPE_CHECKING:
    from pipeline.parquet import Table

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's list
MOST_CLASSES = 1 << 20  # without a class list; far beyond any data set, and a wrong number must not fill the memory
PARQUET_LARGEST = 1 << 24  # bytes of an image; a parquet file does not say how large its largest one is


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


def open_source(recipe: SourceRecipe, class_list: Path | None) -> Source:
    """List a source. Raises DataError for what does not fit together, FormatError for damaged files."""
    names = None if class_list is None else _read_class_list(class_list)
    if recipe.kind == "imagefolder":
        return image_folder(Path(recipe.path), names)
    if recipe.kind == "webdataset":
        return webdataset(_files(recipe.path, ".tar"), names)
    return parquet(_files(recipe.path, ".parquet"), names, recipe.columns or ColumnsRecipe())


def image_folder(root: Path, names: list[str] | None) -> Source:
    """torchvision's ImageFolder layout: root/class/**/image, in sorted order of keys."""
    if not root.is_dir():
        raise DataError(
            f"source.path: expected a folder of class folders, found nothing at {str(root)!r}; check the path"
        )
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(
            f"source.path: expected class folders in {str(root)!r}, found none; images belong in root/CLASS/"
        )
    classes = folders if names is None else names
    numbers = _numbers(folders, classes, f"{root}: expected folders named in the class list")
    found = {name: list(_image_files(root / name)) for name in folders}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(
            f"{root}: expected images in every class folder, found none in {_few(empty)}; add or remove them"
        )
    labels = dict(zip(folders, numbers, strict=True))
    rows = sorted((path.relative_to(root).as_posix(), labels[name], path) for name in found for path in found[name])
    sizes = [path.stat().st_size for _, _, path in rows]
    samples = (Sample(key, label, str(path), path.read_bytes) for key, label, path in rows)
    return Source(classes, [key for key, _, _ in rows], sum(sizes), max(sizes), samples)


def webdataset(shards: list[Path], names: list[str] | None) -> Source:
    """WebDataset tars with KEY.jpg (or .png, .webp, ...) and KEY.cls, as timm's ImageNet shards, in the tars' order.

    A sample's key is the name of its image in the tar.
    """
    index = tqdm(shards, "index", unit="tar", mininterval=0.5)
    images = [image for shard in index for image in tar_images(shard, IMAGE_SUFFIXES)]
    if not images:
        raise DataError(f"{shards[0]}: expected samples (KEY.jpg and KEY.cls), found none; check source.path")
    places: dict[str, Path] = {}
    for image in images:
        if places.setdefault(image.name, image.shard) != image.shard:
            raise DataError(
                f"{image.shard}: expected keys that no other shard has, found {image.name!r} in "
                f"{places[image.name]} too; write the shards with keys that are unique in the data set"
            )
    classes = names or _numbered(max(image.label for image in images))
    for image in images:
        _check_label(image.label, classes, f"{image.shard}: {image.name}")
    samples = (Sample(image.name, image.label, f"{image.shard}: {image.name}", image.read) for image in images)
    sizes = [image.size for image in images]
    return Source(classes, [image.name for image in images], sum(sizes), max(sizes), samples)


def parquet(files: list[Path], names: list[str] | None, columns: ColumnsRecipe) -> Source:
    """Parquet files as Hugging Face datasets writes them, in the order of files and rows.

    Classes are those of the files' metadata; a class list gives these other numbers, by name. Without metadata, labels
    are numbers into the class list. A sample's key is its path in the image column when every row has a different one,
    otherwise FILE/ROW.
    """
    from pipeline.parquet import read_table  # here: pyarrow is large, and nothing else needs it

    tables = [read_table(file, columns) for file in tqdm(files, "index", unit="file", mininterval=0.5)]
    labels = [label for table in tables for label in table.labels.tolist()]
    if not labels:
        raise DataError(f"{files[0]}: expected rows, found none; check source.path")
    for file, table in zip(files, tables, strict=True):
        if table.classes != tables[0].classes:
            raise DataError(f"{file}: expected the class names of {files[0]}, found others; pack them one by one")
    known = tables[0].classes or names or _numbered(max(labels))
    for file, table in zip(files, tables, strict=True):
        for row, label in enumerate(table.labels.tolist()):
            _check_label(label, known, f"{file}: row {row}")
    numbers = range(len(known))
    if names is not None:
        numbers = _numbers(known, names, f"{files[0]}: expected classes of the class list")
    sizes = [size for table in tables for size in table.image_bytes]
    keys = _parquet_keys(files, tables)
    samples = _parquet_samples(files, columns, keys, [numbers[label] for label in labels])
    return Source(names or known, keys, sum(sizes), min(max(sizes), PARQUET_LARGEST), samples)


def _parquet_keys(files: list[Path], tables: "list[Table]") -> list[str]:
    paths = [path for table in tables for path in table.paths]
    if all(paths) and len(set(paths)) == len(paths):
        return [path for path in paths if path]
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(root).as_posix() for file in files]
    return [f"{name}/{row}" for name, table in zip(names, tables, strict=True) for row in range(len(table.labels))]


def _parquet_samples(files: list[Path], columns: ColumnsRecipe, keys: list[str], labels: list[int]) -> Iterator[Sample]:
    from pipeline.parquet import read_images

    rows = ((f"{file}: row {row}", read) for file in files for row, read in enumerate(read_images(file, columns)))
    for key, label, (where, read) in zip(keys, labels, rows, strict=True):
        yield Sample(key, label, where, read)


def _files(pattern: str, suffix: str) -> list[Path]:
    """A file, all files of a kind in a folder, or those of a pattern; a pattern's braces must all be there."""
    path = Path(pattern)
    if path.is_dir():
        found = {pattern: sorted(path.rglob(f"*{suffix}"))}
    elif path.exists():
        found = {pattern: [path]}
    else:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"source.path: expected balanced braces, found {pattern!r} ({error}); correct it") from None
        found = {name: [Path(file) for file in sorted(glob.glob(name, recursive=True))] for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise DataError(f"source.path: expected {suffix} files, found none at {_few(missing)}; check the path")
    return list(dict.fromkeys(file for files in found.values() for file in files))


def _image_files(folder: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(folder, followlinks=True):
        yield from (Path(directory, name) for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _numbered(last: int) -> list[str]:
    return [str(number) for number in range(min(last + 1, MOST_CLASSES))]


def _check_label(label: int, classes: list[str], where: str) -> None:
    if not 0 <= label < len(classes):
        hint = "an unlabelled test set?" if label < 0 else "is the class list of another data set?"
        raise DataError(
            f"{where}: expected a class number from 0 to {len(classes) - 1}, found {label} ({hint}); "
            "leave the file out, or correct `classes`"
        )


def _numbers(names: list[str], classes: list[str], expected: str) -> list[int]:
    """The class number of each name."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(f"{expected}, found {_few(unknown)}; add or remove them")
    index = {name: number for number, name in enumerate(classes)}
    return [index[name] for name in names]


def _read_class_list(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes: expected a readable file with one class name a line, found: {error}") from None
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        raise DataError(f"{path}: expected different class names, one a line, found {_few(twice) if twice else 'none'}")
    return names


def _few(names: list[str]) -> str:
    return few([*map(repr, names)])
