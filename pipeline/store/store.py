"""Stores: the soft labels of all views of a data set, with everything needed to trust and to join them.

A block, one view of `block_rows` rows, is the unit of work, of commit and of resume. Its codes are written first and
its digest last, so a block counts as labeled only when it is whole; the digest also covers the block's place. Blocks
are chunks: any number of processes may write to one store as long as no two write the same block. Rows are joined to
images by key digest, never by position. The format is described in FORMAT.md.
"""

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import StoreManifest, array_digest, parse_sealed
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.location import place
from softshard.pipeline.store.topk import Codes, index_dtype
from softshard.pipeline.store.zarr_group import ATTRIBUTE, ZarrGroup, create_group

FORMAT, VERSION = "softshard-labels", 1
CODE_ARRAYS = ("topk_index", "topk_gap", "tail")


class Store:
    """An open store. `name` is its path or address; `keys` uint64 [N] and `crc32` uint32 [N] say which image each row
    labels."""

    def __init__(self, group: ZarrGroup, manifest: StoreManifest):
        self._group = group
        self.place, self.name = group.place, group.place.name
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

    def digests(self) -> NDArray[np.uint64]:
        """The digest of each block, [V, blocks]; 0: not labeled yet. Raises FormatError for a corrupt one."""
        return self._digests(range(self.manifest.views.count))

    def template_digests(self) -> NDArray[np.uint64]:
        """The digest of each block's tail template, [blocks]; 0: none yet. Raises FormatError for a corrupt one."""
        return self._every("template_digest", (slice(None),), self._template_digest, product(range(self.blocks)))

    def coverage(self) -> NDArray[np.int64]:
        """How many blocks of each view are labeled, [V], from the names of their digests, in a twentieth of the time
        that reading them takes. Damage is noticed where a block is read."""
        views = [view for view, block in self._group.chunks("block_digest") if block < self.blocks]
        return np.bincount(np.array(views, np.int64), minlength=self.manifest.views.count)[: self.manifest.views.count]

    def is_block_labeled(self, view: int, block: int) -> bool:
        return self._digest(view, block) != 0

    def has_template(self, block: int) -> bool:
        return self._template_digest(block) != 0

    def write_block(self, view: int, block: int, codes: Codes) -> None:
        """Commit the codes of one block; it is labeled once this returns. A block that has the same codes already is
        left as it is.

        Raises DataError when it has others, and when the disk is full or refuses; it then still counts as not labeled.
        """
        place, k, classes = self._place(view, block), self.manifest.top_k, self.manifest.classes
        n = place[1].stop - place[1].start
        shapes = (codes.index.shape, codes.gap.shape, codes.tail.shape)
        assert shapes == ((n, k), (n, k - 1), (n,)), f"codes of shapes {shapes} for {n} rows, k = {k}"
        assert codes.index.dtype == index_dtype(classes), f"index {codes.index.dtype} for {classes} classes"
        assert codes.index.max() < classes, f"class {codes.index.max()} of {classes}"
        digest = block_digest(view, block, codes)
        if self._is_new(self._digest(view, block), digest, self._where(view, block)):
            for name, values in code_arrays(codes).items():
                self._group.write(name, place, values)
            self._group.write("block_digest", (view, block), digest)

    def write_template(self, block: int, template: NDArray[np.uint8]) -> None:
        """Commit the tail template of a block's rows, uint8 [rows, C]. Raises as `write_block` does."""
        rows = self.rows(block)
        assert template.shape == (rows.stop - rows.start, self.manifest.classes), f"template {template.shape}"
        assert template.dtype == np.uint8, f"template {template.dtype}"
        digest = template_digest(block, template)
        if self._is_new(self._template_digest(block), digest, self._template_where(block)):
            self._group.write("tail_template", (rows, slice(None)), template)
            self._group.write("template_digest", (block,), digest)

    def read_block(self, view: int, block: int) -> Codes:
        """The codes of one block, verified.

        Raises DataError when the block is not labeled, FormatError when its chunks are corrupt, missing or another
        block's, or hold an index that is no class.
        """
        expected = self._digest(view, block)
        if expected == 0:
            raise DataError(f"{self._where(view, block)}: expected soft labels, found none yet; finish labeling first")
        codes = self._read_codes(self._place(view, block), self._where(view, block), self._remedy(view, block))
        self._check(view, block, codes, expected)
        return codes

    def read_view(self, view: int) -> Codes:
        """The codes of all N rows in one view, every block verified. Raises as `read_block` does."""
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        [digests] = self._digests(range(view, view + 1))
        done = np.count_nonzero(digests)
        if done < self.blocks:
            raise DataError(
                f"{self.name}: view {view}: expected all {self.blocks} blocks labeled, found {done}; "
                "finish labeling first"
            )
        try:  # one array at a time, which needs no second copy of the codes
            codes = self._read_codes((view, slice(None)), self.name, "label again")
        except FormatError:
            for block in range(self.blocks):
                self.read_block(view, block)  # slower, and its error names the block
            raise
        for block in range(self.blocks):
            self._check(view, block, codes[self.rows(block)], int(digests[block]))
        return codes

    def read_rows(self, view: int, rows: NDArray[np.int64]) -> Codes:
        """The codes of some rows in one view, in the order asked for; only their blocks are read, and verified.
        Raises as `read_block` does."""
        rows = np.asarray(rows, np.int64)
        assert ((rows >= 0) & (rows < self.manifest.samples)).all(), f"rows of {self.manifest.samples}"
        blocks = rows // self.manifest.block_rows
        parts, places = [], []
        for block in np.unique(blocks):
            wanted = np.flatnonzero(blocks == block)
            parts.append(self.read_block(view, int(block))[rows[wanted] - block * self.manifest.block_rows])
            places.append(wanted)
        return Codes.concatenate(parts)[np.argsort(np.concatenate(places))]

    def read_template(self, block: int | None = None) -> NDArray[np.uint8]:
        """The tail template of a block's rows, or of all N: uint8 [rows, C], verified.

        Raises DataError when a block has none yet, FormatError when it is corrupt, missing or another block's.
        """
        assert self.manifest.template, "a store without a template"
        if block is None:
            template = np.empty((self.manifest.samples, self.manifest.classes), np.uint8)
            for block in range(self.blocks):
                template[self.rows(block)] = self.read_template(block)
            return template
        where, remedy, expected = (
            self._template_where(block),
            self._template_remedy(block),
            self._template_digest(block),
        )
        if expected == 0:
            raise DataError(f"{where}: expected a template, found none yet; finish labeling first")
        template = self._group.read("tail_template", (self.rows(block), slice(None)), where, remedy)
        found = template_digest(block, template)
        if found != expected:
            raise FormatError(f"{where}: expected content with digest {expected:016x}, found {found:016x}; {remedy}")
        return template

    def grow(self, count: int) -> None:
        """Make room for more views, `count` in all. Raises DataError when the disk refuses."""
        assert count >= self.manifest.views.count, f"{count} views of {self.manifest.views.count}"
        views = self.manifest.views.model_copy(update={"count": count})
        self.manifest = self.manifest.model_copy(update={"views": views})
        self._group.grow(self.manifest)

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of each code array and of the template as they are stored, compressed, without metadata."""
        template = ("tail_template",) if self.manifest.template else ()
        return {name: self._group.stored_bytes(name) for name in CODE_ARRAYS + template}

    def bytes_per_view(self, digests: NDArray[np.uint64] | None = None) -> float:
        """Bytes stored for the codes of one labeled view of one image, on average, without its template. `digests`:
        those of all blocks, where they have been read already, which takes seconds for a large store."""
        digests = self.digests() if digests is None else digests
        rows = [self.rows(block) for block in range(self.blocks)]
        labeled = int(np.count_nonzero(digests, axis=0) @ [part.stop - part.start for part in rows])
        stored = self.stored_bytes()
        return sum(stored[name] for name in CODE_ARRAYS) / max(1, labeled)

    def _read_codes(self, place: tuple[int, slice], where: str, remedy: str) -> Codes:
        index, tail = (self._group.read(name, place, where, remedy) for name in ("topk_index", "tail"))
        has_gaps = self.manifest.top_k > 1
        gap = self._group.read("topk_gap", place, where, remedy) if has_gaps else np.zeros((len(tail), 0), np.uint8)
        return Codes(index, gap, tail)

    def _check(self, view: int, block: int, codes: Codes, expected: int) -> None:
        found = block_digest(view, block, codes)
        if found != expected:
            problem = f"expected content with digest {expected:016x}, found {found:016x}"
        elif codes.index.max() >= self.manifest.classes:
            problem = f"expected classes below {self.manifest.classes}, found {codes.index.max()}"
        else:
            return
        raise FormatError(f"{self._where(view, block)}: {problem}; {self._remedy(view, block)}")

    def _is_new(self, found: int, digest: int, where: str) -> bool:
        """Whether there is something to write. Two writers of one block are harmless when they agree."""
        if found not in (0, digest):
            raise DataError(
                f"{where}: expected it not labeled yet, or with these labels, found another process's; "
                "they were kept: give each launch views of its own with --views"
            )
        return found == 0

    def _digest(self, view: int, block: int) -> int:
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        assert 0 <= block < self.blocks, f"block {block} of {self.blocks}"
        where, remedy = self._where(view, block), self._remedy(view, block)
        return int(self._group.read("block_digest", (view, block), where, remedy))

    def _template_digest(self, block: int) -> int:
        where, remedy = self._template_where(block), self._template_remedy(block)
        return int(self._group.read("template_digest", (block,), where, remedy))

    def _digests(self, views: range) -> NDArray[np.uint64]:
        places = slice(views.start, views.stop), slice(None)
        return self._every("block_digest", places, self._digest, product(views, range(self.blocks)))

    def _every(
        self, name: str, selection: tuple[slice, ...], one: Callable[..., int], places: Iterable[tuple[int, ...]]
    ) -> NDArray[np.uint64]:
        try:
            return self._group.read(name, selection, self.name, "label again")
        except FormatError:
            for place in places:
                one(*place)  # slower, and its error names the block
            raise

    def _place(self, view: int, block: int) -> tuple[int, slice]:
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        return view, self.rows(block)

    def _where(self, view: int, block: int) -> str:
        return f"{self.name}: view {view}, block {block}"

    def _remedy(self, view: int, block: int) -> str:
        return f"delete {self._group.chunk_file('block_digest', view, block)} and label again"

    def _template_where(self, block: int) -> str:
        return f"{self.name}: tail template, block {block}"

    def _template_remedy(self, block: int) -> str:
        return f"delete {self._group.chunk_file('template_digest', block)} and label again"


def store_exists(location: str | Path) -> bool:
    """Whether there is a store to open. Raises DataError for an address that cannot be reached."""
    return place(location).exists()


def create_store(
    location: str | Path,
    manifest: StoreManifest,
    keys: NDArray[np.uint64],
    crc32: NDArray[np.uint32],
    exist_ok: bool = False,
) -> Store:
    """A new store with nothing labeled: whole under its name, or not there.

    location: a path, s3://bucket/path or gs://bucket/path; keys uint64 [N] and crc32 uint32 [N] of the packed images,
    in row order. When another process makes one there at the same time, the first one counts and is opened; with
    `exist_ok` also when it has been there before. Raises DataError when something is there already, or when the disk
    refuses.
    """
    assert keys.shape == crc32.shape == (manifest.samples,), f"{keys.shape}, {crc32.shape} for {manifest.samples} rows"
    assert (keys.dtype, crc32.dtype) == (np.uint64, np.uint32), f"{keys.dtype}, {crc32.dtype}"
    if not exist_ok and place(location).exists():
        raise DataError(f"{location}: expected a free name for a new store, found one in use; remove it, or open it")
    create_group(place(location), manifest, {"key": keys, "crc32": crc32})
    return open_store(location)


def open_store(location: str | Path) -> Store:
    """Open a store at a path, s3://bucket/path or gs://bucket/path, for reading and for labeling; nothing is written.

    Raises DataError when nothing is there or it cannot be reached, FormatError for what is no store, a store of another
    version, a damaged manifest, arrays that are missing or not what the manifest says, and corrupt keys or checksums.
    The codes themselves are verified as they are read.
    """
    group = ZarrGroup(place(location))
    manifest = _parse_manifest(group.place.name, group.attributes)
    group.open_arrays(manifest)
    return Store(group, manifest)


def code_arrays(codes: Codes) -> dict[str, NDArray[Any]]:
    """The arrays of codes by their names in a store; k = 1 has no gaps."""
    arrays = zip(CODE_ARRAYS, (codes.index, codes.gap, codes.tail), strict=True)
    return {name: values for name, values in arrays if values.size}


def block_digest(view: int, block: int, codes: Codes) -> int:
    """BLAKE2b, 8 bytes, over a block's place and content; never 0, which means not labeled."""
    return array_digest(np.array([view, block], np.uint64), codes.index, codes.gap, codes.tail)


def template_digest(block: int, template: NDArray[np.uint8]) -> int:
    """BLAKE2b, 8 bytes, over the place and content of a block's tail template; never 0, which means none."""
    return array_digest(np.array([block], np.uint64), template)


def _parse_manifest(name: str, attributes: dict[str, Any]) -> StoreManifest:
    data = attributes.get(ATTRIBUTE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = f"format {data.get('format')}" if isinstance(data, dict) else "no manifest"
        raise FormatError(f"{name}: expected a store of format {FORMAT}, found {found}; check the path")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{name}: format version {data.get('version')}, this softshard reads {VERSION}; "
            "use the softshard that wrote it, or label again"
        )
    return parse_sealed(StoreManifest, data, name, "label again")
