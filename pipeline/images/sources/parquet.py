"""Parquet files as Hugging Face datasets writes them: an image column {bytes, path}, a label column of integers.

The only module that knows pyarrow. Labels and paths are read first; the images are read once, in batches.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from softshard.pipeline.images.sources.contract import Sample, Source, check_label, class_numbers, numbered_classes
from softshard.pipeline.recipes.recipe import ColumnsRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError

ROWS_AT_ONCE = 64
READ_BYTES = 1 << 20
PARQUET_LARGEST = 1 << 24  # bytes of an image; a parquet file does not say how large its largest one is


class Table(NamedTuple):
    """What a file says without its images.

    A label and a path (None: it has none) for each row, the names of all classes if its metadata has them, and the
    bytes of images in each of its row groups.
    """

    labels: NDArray[np.int64]
    paths: list[str | None]
    classes: list[str] | None
    image_bytes: list[int]


def parquet(files: list[Path], names: list[str] | None, columns: ColumnsRecipe) -> Source:
    """Parquet files as Hugging Face datasets writes them, in the order of files and rows.

    Classes are those of the files' metadata; a class list gives these other numbers, by name. Without metadata, labels
    are numbers into the class list. A sample's key is its path in the image column when every row has a different one,
    otherwise FILE/ROW.

    Raises:
        DataError: for files without rows, with other class names than the first, and class numbers out of range.
        FormatError: for damaged files.
    """
    tables = [read_table(file, columns) for file in tqdm(files, "index", unit="file", mininterval=0.5)]
    labels = [label for table in tables for label in table.labels.tolist()]
    if not labels:
        raise DataError(f"{files[0]}: expected rows, found none; check source.path")
    for file, table in zip(files, tables, strict=True):
        if table.classes != tables[0].classes:
            raise DataError(f"{file}: expected the class names of {files[0]}, found others; pack them one by one")
    known = tables[0].classes or names or numbered_classes(max(labels))
    for file, table in zip(files, tables, strict=True):
        for row, label in enumerate(table.labels.tolist()):
            check_label(label, known, f"{file}: row {row}")
    numbers = range(len(known))
    if names is not None:
        numbers = class_numbers(known, names, f"{files[0]}: expected classes of the class list")
    sizes = [size for table in tables for size in table.image_bytes]
    keys = _keys(files, tables)
    samples = _samples(files, columns, keys, [numbers[label] for label in labels])
    return Source(names or known, keys, sum(sizes), min(max(sizes), PARQUET_LARGEST), samples)


def _keys(files: list[Path], tables: list[Table]) -> list[str]:
    paths = [path for table in tables for path in table.paths]
    if all(paths) and len(set(paths)) == len(paths):
        return [path for path in paths if path]
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(root).as_posix() for file in files]
    return [f"{name}/{row}" for name, table in zip(names, tables, strict=True) for row in range(len(table.labels))]


def _samples(files: list[Path], columns: ColumnsRecipe, keys: list[str], labels: list[int]) -> Iterator[Sample]:
    rows = ((f"{file}: row {row}", read) for file in files for row, read in enumerate(read_images(file, columns)))
    for key, label, (where, read) in zip(keys, labels, rows, strict=True):
        yield Sample(key, label, where, read)


def read_table(path: Path, columns: ColumnsRecipe) -> Table:
    """Read all of a file but its images.

    Raises:
        FormatError: for a damaged file.
        DataError: for missing columns, other types and rows without a label.
    """
    with _open(path) as file:
        schema = file.schema_arrow
        missing = {columns.image, columns.label} - set(schema.names)
        if missing:
            raise DataError(
                f"{path}: expected the columns {columns.image!r} and {columns.label!r}, found {schema.names}; "
                "set source.columns"
            )
        leaf, has_path = _image_leaf(path, schema.field(columns.image))
        labels = _labels(path, file, columns.label)
        paths: list[str | None] = [None] * len(labels)
        if has_path:
            column = file.read([f"{columns.image}.path"])[columns.image]
            paths = [path for chunk in column.chunks for path in chunk.flatten()[0].to_pylist()]
        return Table(labels, paths, _class_names(path, schema, columns.label), _bytes_of_groups(file, leaf))


def read_images(path: Path, columns: ColumnsRecipe) -> Iterator[Callable[[], bytes]]:
    """For each row a function that gives the bytes of the image. Raises FormatError, and DataError for a null."""
    with _open(path) as file:
        leaf, _ = _image_leaf(path, file.schema_arrow.field(columns.image))
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[leaf]):
            column = batch.column(0)
            for value in column.flatten()[0] if pa.types.is_struct(column.type) else column:
                if not value.is_valid:
                    raise DataError(
                        f"{path}: row {row}: expected the bytes of an image, found null; "
                        "write the file with its images embedded, or leave it out"
                    )
                yield value.as_py
                row += 1


def _image_leaf(path: Path, field: pa.Field) -> tuple[str, bool]:
    """The name of the column that holds the bytes, and whether a path stands beside them."""
    if _is_binary(field.type):
        return field.name, False
    parts = {part.name: part.type for part in field.type} if pa.types.is_struct(field.type) else {}
    if not _is_binary(parts.get("bytes", pa.null())):
        raise DataError(
            f"{path}: {field.name}: expected images as {{bytes, path}} or binary, found {field.type}; "
            "set source.columns"
        )
    return f"{field.name}.bytes", pa.types.is_string(parts.get("path", pa.null()))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _labels(path: Path, file: pq.ParquetFile, name: str) -> NDArray[np.int64]:
    column = file.read([name])[name]
    if not pa.types.is_integer(column.type):
        raise DataError(f"{path}: {name}: expected integers, found {column.type}; set source.columns")
    if column.null_count:
        row = np.flatnonzero(column.is_null())[0]
        raise DataError(f"{path}: row {row}: expected a class number, found null; leave the file out")
    return column.to_numpy().astype(np.int64)


def _class_names(path: Path, schema: pa.Schema, label: str) -> list[str] | None:
    """The names of a ClassLabel feature; None when the file does not say."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info.get("info", {}).get("features", {}).get(label, {}).get("names")
        return None if names is None else [str(name) for name in names]
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: expected the metadata that Hugging Face datasets writes, found: {error}; write the file again"
        ) from None


def _bytes_of_groups(file: pq.ParquetFile, leaf: str) -> list[int]:
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return [column.total_uncompressed_size for column in columns if column.path_in_schema == leaf]


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # pre_buffer would read all that is asked for at once; without it, memory holds one row group
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:  # OSError: what pyarrow raises for damaged compression, too
        raise FormatError(
            f"{path}: expected a whole parquet file, found: {' '.join(str(error).split())}; copy or download it again"
        ) from None
