"""Stores: the soft labels of all views of a data set, with everything needed to trust and to join them.

A block, one view of `block_rows` rows, is the unit of work, of commit and of resume. Its codes are written first and
its digest last, so a block counts as labelled only when it is whole; the digest also covers the block's place. Blocks
are chunks: any number of processes may write to one store as long as no two write the same block. Rows are joined to
images by key digest, never by position. The format is described in FORMAT.md.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.errors import DataError, FormatError
from pipeline.manifest import StoreManifest, array_digest
from pipeline.topk import Codes, index_dtype
from pipeline.zarr_store import ATTRIBUTE, ZarrGroup, create_group

FORMAT, VERSION = "softshard-labels", 1
CODE_ARRAYS = ("topk_index", "topk_gap", "tail")


class Store:
    """An open store. `keys` uint64 [N] and `crc32` uint32 [N] say which image each row labels."""

    def __init__(self, group: ZarrGroup, manifest: StoreManifest):
        self._group = group
        self.path = group.path
        self.manifest = manifest
        self.keys: NDArray[np.uint64] = group.read_column("key")
        self.crc32: NDArray[np.uint32] = group.read_column("crc32")

    @property
    def blocks(self) -> int:
        """The number of blocks of each view."""
        return -(-self.manifest.samples // self.manifest.block_rows)

    def rows(self, block: int) -> slice:
        """The rows of a block; the last one of a view may be shorter."""
        assert 0 <= block < self.blocks, f"block {block} of {self.blocks}"
        first = block * self.manifest.block_rows
        return slice(first, min(first + self.manifest.block_rows, self.manifest.samples))

    def missing(self) -> list[tuple[int, int]]:
        """(view, block) of everything not labelled yet, view by view. Raises FormatError for a corrupt digest."""
        return [(int(view), int(block)) for view, block in np.argwhere(self._digests() == 0)]

    def coverage(self) -> NDArray[np.int64]:
        """How many blocks of each view are labelled, [V]. Raises FormatError for a corrupt digest."""
        return np.count_nonzero(self._digests(), axis=1)

    def is_labelled(self, view: int) -> bool:
        return all(self.is_block_labelled(view, block) for block in range(self.blocks))

    def is_block_labelled(self, view: int, block: int) -> bool:
        return self._digest(view, block) != 0

    def write_block(self, view: int, block: int, codes: Codes) -> None:
        """Commit the codes of one block; it is labelled once this returns.

        Raises DataError when the disk is full or refuses; the block then still counts as not labelled.
        """
        place, k, classes = self._place(view, block), self.manifest.top_k, self.manifest.classes
        n = place[1].stop - place[1].start
        shapes = (codes.index.shape, codes.gap.shape, codes.tail.shape)
        assert shapes == ((n, k), (n, k - 1), (n,)), f"codes of shapes {shapes} for {n} rows, k = {k}"
        assert codes.index.dtype == index_dtype(classes), f"index {codes.index.dtype} for {classes} classes"
        assert codes.index.max() < classes, f"class {codes.index.max()} of {classes}"
        for name, values in zip(CODE_ARRAYS, (codes.index, codes.gap, codes.tail), strict=True):
            if values.size:  # k = 1 has no gaps
                self._group.write(name, place, values)
        self._group.write("block_digest", (view, block), block_digest(view, block, codes))

    def read_block(self, view: int, block: int) -> Codes:
        """The codes of one block, verified.

        Raises DataError when the block is not labelled, FormatError when its chunks are corrupt, missing or another
        block's, or hold an index that is no class.
        """
        expected = self._digest(view, block)
        if expected == 0:
            raise DataError(f"{self._where(view, block)}: expected soft labels, found none yet; finish labelling first")
        index, tail = self._read("topk_index", view, block), self._read("tail", view, block)
        gap = self._read("topk_gap", view, block) if self.manifest.top_k > 1 else np.zeros((len(tail), 0), np.uint8)
        codes = Codes(index, gap, tail)
        found = block_digest(view, block, codes)
        if found != expected:
            problem = f"expected content with digest {expected:016x}, found {found:016x}"
        elif index.max() >= self.manifest.classes:
            problem = f"expected classes below {self.manifest.classes}, found {index.max()}"
        else:
            return codes
        raise FormatError(f"{self._where(view, block)}: {problem}; {self._remedy(view, block)}")

    def read_view(self, view: int) -> Codes:
        """The codes of all N rows in one view, every block verified. Raises as `read_block` does."""
        done = sum(self._digest(view, block) != 0 for block in range(self.blocks))
        if done < self.blocks:
            raise DataError(
                f"{self.path}: view {view}: expected all {self.blocks} blocks labelled, found {done}; "
                "finish labelling first"
            )
        return Codes.concatenate([self.read_block(view, block) for block in range(self.blocks)])

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk of each code array, compressed, without metadata."""
        return {name: self._group.stored_bytes(name) for name in CODE_ARRAYS}

    def bytes_per_view(self) -> float:
        """Bytes on disk of the codes of one labelled view of one image, on average."""
        labelled = np.count_nonzero(self._digests(), axis=0) @ [
            r.stop - r.start for r in map(self.rows, range(self.blocks))
        ]
        return sum(self.stored_bytes().values()) / max(1, int(labelled))

    def _read(self, name: str, view: int, block: int) -> NDArray[Any]:
        return self._group.read(name, self._place(view, block), self._where(view, block), self._remedy(view, block))

    def _digest(self, view: int, block: int) -> int:
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        assert 0 <= block < self.blocks, f"block {block} of {self.blocks}"
        where, remedy = self._where(view, block), self._remedy(view, block)
        return int(self._group.read("block_digest", (view, block), where, remedy))

    def _digests(self) -> NDArray[np.uint64]:
        try:
            return self._group.read("block_digest", (slice(None), slice(None)), str(self.path), "label again")
        except FormatError:
            for view, block in np.ndindex(self.manifest.views.count, self.blocks):
                self._digest(view, block)  # slower, and its error names the block
            raise

    def _place(self, view: int, block: int) -> tuple[int, slice]:
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        return view, self.rows(block)

    def _where(self, view: int, block: int) -> str:
        return f"{self.path}: view {view}, block {block}"

    def _remedy(self, view: int, block: int) -> str:
        return f"delete {self._group.chunk_file('block_digest', view, block)} and label again"


def create_store(path: Path, manifest: StoreManifest, keys: NDArray[np.uint64], crc32: NDArray[np.uint32]) -> Store:
    """A new store with nothing labelled: whole under its name, or not there.

    keys uint64 [N] and crc32 uint32 [N] of the packed images, in row order. Raises DataError when something is at
    `path` already, or when the disk refuses.
    """
    assert keys.shape == crc32.shape == (manifest.samples,), f"{keys.shape}, {crc32.shape} for {manifest.samples} rows"
    assert (keys.dtype, crc32.dtype) == (np.uint64, np.uint32), f"{keys.dtype}, {crc32.dtype}"
    create_group(path, manifest, {"key": keys, "crc32": crc32})
    return open_store(path)


def open_store(path: Path) -> Store:
    """Open a store for reading and for labelling; nothing is written.

    Raises DataError when nothing is there, FormatError for what is no store, a store of another version, a damaged
    manifest, arrays that are missing or not what the manifest says, and corrupt keys or checksums. The codes
    themselves are verified as they are read.
    """
    group = ZarrGroup(path)
    manifest = _parse_manifest(path, group.attributes)
    group.open_arrays(manifest)
    return Store(group, manifest)


def block_digest(view: int, block: int, codes: Codes) -> int:
    """BLAKE2b, 8 bytes, over a block's place and content; never 0, which means not labelled."""
    return array_digest(np.array([view, block], np.uint64), codes.index, codes.gap, codes.tail)


def _parse_manifest(path: Path, attributes: dict[str, Any]) -> StoreManifest:
    data = attributes.get(ATTRIBUTE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = f"format {data.get('format')}" if isinstance(data, dict) else "no manifest"
        raise FormatError(f"{path}: expected a store of format {FORMAT}, found {found}; check the path")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{path}: format version {data.get('version')}, this softshard reads {VERSION}; "
            "use the softshard that wrote it, or label again"
        )
    try:
        return StoreManifest.model_validate_json(json.dumps(data))  # through JSON, where a list is a legal tuple
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)]
        raise FormatError(
            f"{path}: expected a manifest of version {VERSION}, found problems: {'; '.join(problems)}; label again"
        ) from None
