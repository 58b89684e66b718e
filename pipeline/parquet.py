"""Parquet files as Hugging Face datasets writes them: an image column {bytes, path}, a label column of integers.

The only module that knows pyarrow. Labels and paths are read first; the images are read once, in batches.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError, FormatError
from pipeline.recipe import ColumnsRecipe

ROWS_AT_ONCE = 64
READ_BYTES = 1 << 20


class Table(NamedTuple):
    """What a file says without its images: a label and a path (None: it has none) for each row, the names of all
    classes if its metadata has them, and the bytes of images in each of its row groups."""

    labels: NDArray[np.int64]
    paths: list[str | None]
    classes: list[str] | None
    image_bytes: list[int]


def read_table(path: Path, columns: ColumnsRecipe) -> Table:
    """Raises FormatError for a damaged file, DataError for missing columns, other types and rows without a label."""
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
    """A function that gives the bytes of the image, for each row. Raises FormatError, and DataError for a null."""
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
