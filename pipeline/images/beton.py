"""The .beton file: FFCV's format, written with the JPEG bytes as they were, opened only when it is whole.

FFCV's own writer re-encodes every JPEG; the layout written here (header, field descriptors, sample table, pages,
allocation table) is the one its reader and loaders expect, so stock FFCV opens the file too.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.ffcv_bridge import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FieldDescType,
    HeaderType,
    IntField,
    Reader,
    RGBImageField,
    get_metadata_type,
)
from softshard.pipeline.images.manifest import PackManifest, key_digests, load_sealed
from softshard.pipeline.runtime.errors import DataError, FormatError

JPEG_MODE = 0
MIN_PAGE_BYTES = 1 << 21
FIELDS = {"image": (2, RGBImageField()), "label": (1, IntField())}  # name: (FFCV's type id, field)
ROW_TYPE = get_metadata_type([field for _, field in FIELDS.values()])
_TABLE_START = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize


class PackedImage(NamedTuple):
    """One row to write: a baseline or progressive JPEG that turbojpeg decodes to RGB, with its size and class."""

    jpeg: bytes
    width: int
    height: int
    label: int


@dataclass(frozen=True)
class Beton:
    """An opened .beton. Arrays have one entry for each row: digests uint64, checksums uint32, everything else int64."""

    path: Path
    manifest: PackManifest
    keys: NDArray[np.uint64]
    crc32: NDArray[np.uint32]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def key_order(self) -> NDArray[np.int64]:
        """The rows in the order of their key digests."""
        return np.argsort(self.keys)


def is_beton(path: str | Path) -> bool:
    """Whether a path names a packed file, by what stands there or by its suffix; else it is a store or shards."""
    return str(path).endswith(".beton") or Path(path).is_file()


def manifest_path(beton: Path) -> Path:
    """Where the manifest of a packed file is: images.beton -> images.manifest.json."""
    return beton.with_suffix(".manifest.json")


def open_beton(path: str | Path) -> Beton:
    """Open a packed file and its manifest.

    Raises:
        DataError: when one of the two is not there.
        FormatError: when they do not belong together, the file is truncated, or it is not a .beton.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a packed image file, found none; make it with `softshard pack`")
    manifest = _read_manifest(manifest_path(path))
    size = path.stat().st_size
    if size != manifest.beton_bytes:
        raise FormatError(
            f"{path}: expected {manifest.beton_bytes} bytes, as {manifest_path(path).name} says, found {size}; "
            "the file is truncated or not the one packed with this manifest: copy both again, or pack again"
        )
    if tables_crc32(path, len(manifest.keys)) != manifest.tables_crc32:
        raise FormatError(
            f"{path}: expected the header and tables that {manifest_path(path).name} records, found others; "
            "the file is damaged or not the one packed with this manifest: copy both again, or pack again"
        )
    try:
        reader = Reader(str(path))
        rows, table = reader.metadata, reader.alloc_table
        if reader.field_names != list(FIELDS) or rows.dtype != ROW_TYPE:
            raise ValueError(f"fields {reader.field_names}")
        return _beton(path, manifest, rows, table, int(reader.header["alloc_table_ptr"]))
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        raise FormatError(
            f"{path}: expected FFCV format {CURRENT_VERSION} with the fields {list(FIELDS)}, found: {error}; pack again"
        ) from None


def write_beton(path: Path, images: Iterable[PackedImage], capacity: int, largest: int) -> int:
    """Write images in order. Pages are FFCV's unit of caching: no image crosses one.

    Args:
        path: the new file.
        images: rows of JPEGs with their sizes and classes.
        capacity: bounds the number of images, whose table precedes the data.
        largest: the expected size of the biggest image, in bytes.

    Returns:
        The size of the file in bytes.

    Raises:
        DataError: for an image that is larger than a page.
    """
    page = 1 << max(MIN_PAGE_BYTES.bit_length() - 1, (2 * largest - 1).bit_length())
    rows, table = np.zeros(capacity, ROW_TYPE), np.zeros(capacity, ALLOC_TABLE_TYPE)
    position = -(-(_TABLE_START + rows.nbytes) // page) * page
    count = 0
    with path.open("wb") as file:
        for count, image in enumerate(images, 1):
            if page - position % page < len(image.jpeg):
                position = -(-position // page) * page
            if len(image.jpeg) > page:
                raise DataError(
                    f"row {count - 1}: expected a JPEG below {page} bytes, found {len(image.jpeg)}; set max_side"
                )
            file.seek(position)
            file.write(image.jpeg)
            rows[count - 1] = ((JPEG_MODE, image.width, image.height, position), image.label)
            table[count - 1] = (count - 1, position, len(image.jpeg))
            position += len(image.jpeg)
        file.seek(position)
        file.write(table[:count].tobytes())
        file.seek(0)
        file.write(_header(count, page, position))
        file.write(rows[:count].tobytes())
    return position + table[:count].nbytes


def tables_crc32(path: Path, count: int) -> int:
    """CRC-32 of all of a file of `count` rows that is not image data: header, fields, row table, allocation table."""
    before, after = _TABLE_START + count * ROW_TYPE.itemsize, count * ALLOC_TABLE_TYPE.itemsize
    with path.open("rb") as file:
        crc = zlib.crc32(file.read(before))
        file.seek(max(0, path.stat().st_size - after))
        return zlib.crc32(file.read(), crc)


def padding(beton: Beton) -> Iterator[slice]:
    """Where a packed file holds nothing, which is zeros: from the rows to the first page, and at the ends of pages."""
    order, count = np.argsort(beton.offsets), len(beton)
    ends = beton.offsets[order] + beton.lengths[order]
    starts = np.append(beton.offsets[order], beton.manifest.beton_bytes - count * ALLOC_TABLE_TYPE.itemsize)
    for end, start in zip([_TABLE_START + count * ROW_TYPE.itemsize, *ends.tolist()], starts.tolist(), strict=True):
        if end < start:
            yield slice(end, start)


def _header(count: int, page: int, table_position: int) -> bytes:
    header, fields = np.zeros((), HeaderType), np.zeros(len(FIELDS), FieldDescType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(FIELDS), page
    header["num_samples"], header["alloc_table_ptr"] = count, table_position
    for descriptor, (name, (type_id, field)) in zip(fields, FIELDS.items(), strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"][:] = field.to_binary()[0]
    return header.tobytes() + fields.tobytes()


def _read_manifest(path: Path) -> PackManifest:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: expected the manifest of the .beton beside it, found none; copy it too, or pack again"
        ) from None
    return load_sealed(PackManifest, text, str(path), "copy it again, or pack again")


def _beton(path: Path, manifest: PackManifest, rows: NDArray, table: NDArray, table_position: int) -> Beton:
    order = np.argsort(table["ptr"])
    offsets, image = rows["f0"]["data_ptr"], rows["f0"]
    entry = order[np.searchsorted(table["ptr"], offsets, sorter=order).clip(max=len(order) - 1)]
    lengths = table["size"][entry]
    if not len(rows) == len(table) == len(manifest.keys):
        raise ValueError(f"{len(rows)} rows and {len(table)} images for {len(manifest.keys)} keys")
    ends = np.array([offsets, lengths, offsets + lengths])  # unsigned: a sum alone could wrap around
    if (table["ptr"][entry] != offsets).any() or (ends > table_position).any():
        raise ValueError("rows that point outside the image data")
    if (lengths != np.array(manifest.sizes, np.uint64)).any():
        raise ValueError("image sizes that differ from the manifest's")
    if (image["mode"] != JPEG_MODE).any() or not (image["height"].all() and image["width"].all()):
        raise ValueError("rows that are not JPEGs")
    if rows["f1"].min() < 0 or rows["f1"].max() >= len(manifest.classes):
        raise ValueError("labels outside the class list")
    columns = (rows["f1"], offsets, lengths, image["height"], image["width"])
    return Beton(
        path,
        manifest,
        key_digests(manifest.keys),
        np.array(manifest.crc32, np.uint32),
        *(np.ascontiguousarray(column, np.int64) for column in columns),
    )
