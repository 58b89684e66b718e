"""The zarr v3 group below a store: the layout of its arrays, files, and what can be wrong with them.

The only module that knows zarr. It moves arrays and turns what zarr, the codecs and the disk report into this
project's errors; what the arrays mean is store.py's business. The layout is described byte for byte in FORMAT.md.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.errors import DataError, FormatError
from pipeline.manifest import StoreManifest
from pipeline.topk import index_dtype

ATTRIBUTE = "softshard"  # the group attribute that holds the manifest
Selection = tuple[int | slice, ...]

# a chunk of nothing but fill values is written all the same: a chunk that is missing is a chunk lost
_CONFIG: ArrayConfigParams = {"write_empty_chunks": True}
# what zarr and its codecs raise for damaged chunks and metadata: no common base, found by damaging every byte
_DAMAGE = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError)


class Layout(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: int
    transposed: bool = False  # the last two axes change places before compression


def layouts(manifest: StoreManifest) -> dict[str, Layout]:
    """The arrays a store of this manifest has, by name. With k = 1 there are no gaps and no gap array."""
    n, v, k, rows = manifest.samples, manifest.views.count, manifest.top_k, manifest.block_rows
    u1, u4, u8, index = np.dtype(np.uint8), np.dtype(np.uint32), np.dtype(np.uint64), index_dtype(manifest.classes)
    view_sample = ("view", "sample")
    arrays = {
        "key": Layout(u8, (n,), (n,), ("sample",), 0),
        "crc32": Layout(u4, (n,), (n,), ("sample",), 0),
        "topk_index": Layout(index, (v, n, k), (1, rows, k), (*view_sample, "rank"), np.iinfo(index).max),
        "topk_gap": Layout(u1, (v, n, k - 1), (1, rows, k - 1), (*view_sample, "step"), 255, transposed=True),
        "tail": Layout(u1, (v, n), (1, rows), view_sample, 255),
        "block_digest": Layout(u8, (v, -(-n // rows)), (1, 1), ("view", "block"), 0),
    }
    if k == 1:
        del arrays["topk_gap"]
    return arrays


class ZarrGroup:
    """The arrays of one store on a local path. Opening reads metadata and writes nothing."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise DataError(f"{path}: expected a store of labels, found nothing there; check the path, or label first")
        if not path.is_dir():
            raise FormatError(f"{path}: expected a store of labels, which is a folder, found a file; check the path")
        with _reading(str(path), "a store of labels (a zarr v3 group)", "check the path, or label again"):
            self._group = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
            self.attributes: dict[str, Any] = self._group.attrs.asdict()
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def open_arrays(self, manifest: StoreManifest) -> None:
        """Raises FormatError unless each array is there and is what the manifest says."""
        for name, layout in layouts(manifest).items():
            where = f"{self.path}/{name}"
            with _reading(where, "an array", "restore its zarr.json, or label again"):
                node = self._group[name]
            self._arrays[name] = _checked_array(where, node, layout).with_config(_CONFIG)

    def read(self, name: str, selection: Selection, where: str, remedy: str) -> NDArray[Any]:
        """One part of an array, C-contiguous. Raises FormatError for corrupt chunks, naming `where` and the array."""
        with _reading(f"{where}: {name}", "intact chunks", remedy):
            return np.asarray(self._arrays[name][selection], order="C")

    def read_column(self, name: str) -> NDArray[Any]:
        """A whole array that is written once, at creation. Raises FormatError also when its chunk is missing."""
        remedy = "restore the store from a copy, or label again"
        with _reading(f"{self.path}/{name}", "intact chunks", remedy):
            missing = self._arrays[name].nchunks - self._arrays[name].nchunks_initialized
        if missing:
            raise FormatError(f"{self.path}/{name}: expected its chunk, found none; {remedy}")
        return self.read(name, (slice(None),), str(self.path), remedy)

    def write(self, name: str, selection: Selection, values: NDArray[Any] | int) -> None:
        """Raises DataError when the disk refuses."""
        with _writing(self.path):
            self._arrays[name][selection] = values

    def chunk_file(self, name: str, *position: int) -> Path:
        return self.path.joinpath(name, "c", *map(str, position))

    def stored_bytes(self, name: str) -> int:
        """Bytes of an array's chunks on disk, without metadata; 0 for an array that this store does not have."""
        return sum(file.stat().st_size for file in (self.path / name / "c").rglob("*") if file.is_file())


def create_group(path: Path, manifest: StoreManifest, columns: Mapping[str, NDArray[Any]]) -> None:
    """Create an empty store with its key and crc32 columns: whole under its name, or not at all.

    Raises DataError when there is something at `path` already, or the disk refuses.
    """
    if path.exists():
        raise DataError(f"{path}: expected a free name for a new store, found a file or folder; remove it, or open it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _writing(path):
        try:
            for name, data in _new_group(manifest, columns).items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(data)
            os.rename(partial, path)  # refuses when another process was faster
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _new_group(manifest: StoreManifest, columns: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    # made in memory: zarr writes several files at a time, and goes on with the others behind our back when one fails
    files: dict[str, Buffer] = {}
    attributes: dict[str, Any] = {ATTRIBUTE: manifest.model_dump(mode="json")}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    for name, layout in layouts(manifest).items():
        array = _create_array(group, name, layout)
        if name in columns:
            array[:] = columns[name]
    return {name: data.to_bytes() for name, data in files.items()}


def _create_array(group: zarr.Group, name: str, layout: Layout) -> zarr.Array[Any]:
    blosc = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=layout.dtype.itemsize)
    return group.create_array(
        name,
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=layout.chunk,
        filters=[TransposeCodec(order=(0, 2, 1))] if layout.transposed else [],
        compressors=[blosc, Crc32cCodec()],  # without the checksum, blosc and zstd decode flipped bytes in silence
        fill_value=layout.fill,
        dimension_names=layout.dimensions,
        config=_CONFIG,
    )


def _checked_array(where: str, node: Any, layout: Layout) -> zarr.Array[Any]:
    if not isinstance(node, zarr.Array):
        raise FormatError(f"{where}: expected an array, found a group; restore its zarr.json, or label again")
    ends_in = node.compressors[-1] if node.compressors else None
    names = ("dtype", "shape", "chunk", "last codec")
    expected = (layout.dtype, layout.shape, layout.chunk, Crc32cCodec())
    found = (node.dtype, node.shape, node.chunks, ends_in)
    wrong = [f"{name} {b} (not {a})" for name, a, b in zip(names, expected, found, strict=True) if a != b]
    if wrong:
        raise FormatError(f"{where}: expected what the manifest says, found {', '.join(wrong)}; label again")
    return node


@contextmanager
def _reading(where: str, expected: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise FormatError(f"{where}: expected {expected}, found: {str(error).rstrip('.')}; {remedy}") from error
    except OSError as error:
        raise DataError(f"{where}: expected {expected}, found: {error}; check permissions and the disk") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: expected to write, found: {error}; make room or check permissions, then run again: "
            "finished blocks are kept"
        ) from error
