"""The zarr v3 group below a store: the layout of its arrays, files, and what can be wrong with them.

The only module that knows zarr. It opens a store, moves arrays and turns what zarr, the codecs and the disk report
into this project's errors; what the arrays mean is the business of store.py and unit.py. The layout is described byte
for byte in docs/format.md.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from softshard.pipeline.images.manifest import StoreManifest, parse_sealed, sealed
from softshard.pipeline.runtime.errors import DataError, FormatError, error_context
from softshard.pipeline.store.location import Bucket, Folder, Location, first_line, writing
from softshard.pipeline.store.topk import index_dtype
from softshard.pipeline.store.unit import Selection, block_count

ATTRIBUTE = "softshard"  # the group attribute that holds the manifest
FORMAT, VERSION = "softshard-labels", 1

# a chunk of nothing but fill values is written all the same: a chunk that is missing is a chunk lost
_CONFIG: ArrayConfigParams = {"write_empty_chunks": True}
# what zarr and its codecs raise for damaged chunks and metadata: no common base, found by damaging every byte
_DAMAGE = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OverflowError)


class Layout(NamedTuple):
    """The first of `dimensions` is "view" where an array grows with the number of views."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: int
    transposed: bool = False  # the last two axes change places before compression


def layouts(manifest: StoreManifest) -> dict[str, Layout]:
    """The arrays a store of this manifest has, by name.

    With k = 1 there are no gaps and no gap array; without a template there are no template arrays.
    """
    n, v, k, rows = manifest.samples, manifest.views.count, manifest.top_k, manifest.block_rows
    u1, u4, u8, index = np.dtype(np.uint8), np.dtype(np.uint32), np.dtype(np.uint64), index_dtype(manifest.classes)
    view_sample = ("view", "sample")
    arrays = {
        "key": Layout(u8, (n,), (n,), ("sample",), 0),
        "crc32": Layout(u4, (n,), (n,), ("sample",), 0),
        "topk_index": Layout(index, (v, n, k), (1, rows, k), (*view_sample, "rank"), np.iinfo(index).max),
        "topk_gap": Layout(u1, (v, n, k - 1), (1, rows, k - 1), (*view_sample, "step"), 255, transposed=True),
        "tail": Layout(u1, (v, n), (1, rows), view_sample, 255),
        "block_digest": Layout(u8, (v, block_count(manifest)), (1, 1), ("view", "block"), 0),
    }
    if k == 1:
        del arrays["topk_gap"]
    if manifest.template:
        classes = manifest.classes
        arrays["tail_template"] = Layout(u1, (n, classes), (rows, classes), ("sample", "class"), 255)
        arrays["template_digest"] = Layout(u8, (block_count(manifest),), (1,), ("block",), 0)
    return arrays


class ZarrGroup:
    """The arrays and the manifest of one store. Opening reads metadata and writes nothing.

    Raises:
        DataError: When nothing is there, or it cannot be reached.
        FormatError: For what is no store of this format, and for arrays that are not what the manifest says.
    """

    def __init__(self, location: Location):
        self.location = location
        if not location.exists():
            raise DataError(
                f"{location.name}: expected a store of labels, found nothing there; check the path, or label first"
            )
        with (
            error_context(location.name, "check the path, or label again"),
            _reading("expected a store of labels (a zarr v3 group)"),
        ):
            self._group = _open_group(_storage(location), "r+")
            attributes = self._group.attrs.asdict()
        self.manifest = _parse_manifest(location.name, attributes)
        self._arrays = self._open_arrays()

    def read(self, name: str, selection: Selection) -> NDArray[Any]:
        """One part of an array, C-contiguous.

        Raises:
            FormatError: For corrupt chunks. Whose they are, and what to do, is for the caller to add.
            DataError: When the disk or the bucket refuses, likewise.
        """
        with _reading(f"{name}: expected intact chunks"):
            return np.asarray(self._arrays[name][selection], order="C")

    def read_column(self, name: str) -> NDArray[Any]:
        """A whole array that is written once, at creation. Raises FormatError also when its chunk is missing."""
        array = self._arrays[name]
        with error_context(self.location.name, "restore the store from a copy, or label again"):
            with _reading(f"{name}: expected intact chunks"):
                missing = array.nchunks - array.nchunks_initialized
            if missing:
                raise FormatError(f"{name}: expected its chunk, found none")
            return self.read(name, (slice(None),))

    def write(self, name: str, selection: Selection, values: NDArray[Any] | int) -> None:
        """Raises DataError when the disk refuses."""
        with writing(self.location.name):
            self._arrays[name][selection] = values

    def grow(self, manifest: StoreManifest) -> None:
        """Make room for the views of a manifest that has more of them.

        The manifest comes last: after a crash in between the store is what it was before, with arrays that are larger
        than it needs.
        """
        with writing(self.location.name):
            for name, layout in layouts(manifest).items():
                if self._arrays[name].shape < layout.shape:
                    self._arrays[name].resize(layout.shape)
            self._group.attrs[ATTRIBUTE] = sealed(manifest)
        self.manifest = manifest

    def chunks(self, name: str) -> list[tuple[int, ...]]:
        """The positions of an array's chunks that were written."""
        files = (file.split("/") for file in self.location.sizes(f"{name}/c"))
        return [tuple(map(int, parts)) for parts in files if all(map(str.isdecimal, parts))]  # else half a file

    def chunk_file(self, name: str, *position: int) -> str:
        """The path or address of a chunk."""
        return "/".join([self.location.name, name, "c", *map(str, position)])

    def stored_bytes(self, name: str) -> int:
        """Bytes of an array's chunks, without metadata; 0 for an array that this store does not have."""
        return sum(self.location.sizes(f"{name}/c").values())

    def _open_arrays(self) -> dict[str, zarr.Array[Any]]:
        expected = _open_group(MemoryStore(_new_group(self.manifest, {})), "r")
        return {name: self._open_array(name, expected[name]).with_config(_CONFIG) for name in layouts(self.manifest)}

    def _open_array(self, name: str, expected: Any) -> zarr.Array[Any]:
        where = f"{self.location.name}/{name}"
        with error_context(where, "restore its zarr.json, or label again"):
            with _reading("expected an array"):
                node = self._group[name]
            if not isinstance(node, zarr.Array):
                raise FormatError("expected an array, found a group")
        wrong = _differences(node, expected)
        if wrong:
            raise FormatError(f"{where}: expected what the manifest says, found {', '.join(wrong)}; label again")
        return node


def create_group(location: Location, manifest: StoreManifest, columns: Mapping[str, NDArray[Any]]) -> bool:
    """Create an empty store with its key and crc32 columns; False when another process did so at the same time.

    Raises DataError when the disk or the bucket refuses.
    """
    return location.create({name: data.to_bytes() for name, data in _new_group(manifest, columns).items()})


def compressed_bytes(manifest: StoreManifest, parts: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """What the chunks of some arrays take in a store of this manifest, if they were all of it."""
    files = _new_group(manifest, parts)
    return {array: sum(len(data) for name, data in files.items() if name.startswith(f"{array}/c/")) for array in parts}


def _storage(location: Location) -> LocalStore | ObjectStore[Any]:
    if isinstance(location, Folder):
        return LocalStore(location.path)
    assert isinstance(location, Bucket)
    return ObjectStore(location.objects)


def _open_group(storage: LocalStore | ObjectStore[Any] | MemoryStore, mode: Literal["r", "r+"]) -> zarr.Group:
    return zarr.open_group(  # pyright: ignore[reportUnknownMemberType]
        storage, mode=mode, zarr_format=3, use_consolidated=False
    )


def _new_group(manifest: StoreManifest, columns: Mapping[str, NDArray[Any]]) -> dict[str, Buffer]:
    # made in memory: zarr writes several files at a time, and goes on with the others behind our back when one fails
    files: dict[str, Buffer] = {}
    attributes: dict[str, Any] = {ATTRIBUTE: sealed(manifest)}
    memory = MemoryStore(files)
    group = zarr.create_group(memory, zarr_format=3, attributes=attributes)  # pyright: ignore[reportUnknownMemberType]
    for name, layout in layouts(manifest).items():
        array = _create_array(group, name, layout)
        if name in columns:
            array[:] = columns[name]
    return files


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


def _differences(node: zarr.Array[Any], wanted: Any) -> list[str]:
    """In what the metadata of an array differs from that of a new one: 'fill_value 0 (not 255)'."""
    metadata: Any = node.metadata
    found, expected = metadata.to_dict(), wanted.metadata.to_dict()
    names = expected["dimension_names"]
    if isinstance(names, tuple) and names[0] == "view" and node.shape[0] >= wanted.shape[0]:
        expected["shape"] = (node.shape[0], *wanted.shape[1:])  # its growth was cut off before the manifest's
    keys = [key for key in expected | found if found.get(key) != expected.get(key)]
    return [f"{key} {found.get(key)} (not {expected.get(key)})" for key in keys]


def _parse_manifest(name: str, attributes: dict[str, Any]) -> StoreManifest:
    attribute = attributes.get(ATTRIBUTE)
    data = cast(dict[str, Any], attribute) if isinstance(attribute, dict) else None
    if data is None or data.get("format") != FORMAT:
        found = "no manifest" if data is None else f"format {data.get('format')}"
        raise FormatError(f"{name}: expected a store of format {FORMAT}, found {found}; check the path")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{name}: format version {data.get('version')}, this softshard reads {VERSION}; "
            "use the softshard that wrote it, or label again"
        )
    return parse_sealed(StoreManifest, data, name, "label again")


@contextmanager
def _reading(expected: str) -> Generator[None]:
    """What zarr, the codecs and the disk raise, as this project's errors, for `error_context` to say where."""
    try:
        yield
    except _DAMAGE as error:
        raise FormatError(f"{expected}, found: {str(error).rstrip('.')}") from error
    except (OSError, BaseError) as error:
        raise DataError(f"{expected}, found: {first_line(error)}; check permissions and the disk") from error
