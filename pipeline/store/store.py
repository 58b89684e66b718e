"""Stores: the soft labels of all views of a data set, with everything needed to trust and to join them.

What is committed at once is a unit: a block, the codes of one view of `block_rows` rows, or the tail template of such
rows. Its arrays are written first and its digest last, so a unit counts as labeled only when it is whole; the digest
also covers the unit's position. Units are chunks: any number of processes may write to one store as long as no two
write the same unit. Rows are joined to images by key digest, never by position. The format is described in
docs/format.md.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.runtime.errors import DataError, FormatError, error_context
from softshard.pipeline.store.location import locate
from softshard.pipeline.store.topk import Codes, index_dtype
from softshard.pipeline.store.unit import (
    CODE_ARRAYS,
    Arrays,
    Selection,
    Unit,
    block_count,
    block_rows,
    block_unit,
    code_arrays,
    codes_of,
    template_unit,
)
from softshard.pipeline.store.zarr_group import ZarrGroup, create_group


class Store:
    """An open store.

    Attributes:
        name: Its path or address.
        location: The folder or the bucket where it lies.
        manifest: What its codes depend on.
        keys: uint64 [N], the key digest of the image that each row labels.
        crc32: uint32 [N], the CRC-32 of that image.
    """

    def __init__(self, group: ZarrGroup):
        self._group = group
        self.location, self.name = group.location, group.location.name
        self.manifest = group.manifest
        self.keys: NDArray[np.uint64] = group.read_column("key")
        self.crc32: NDArray[np.uint32] = group.read_column("crc32")

    @property
    def blocks(self) -> int:
        """The number of blocks of each view."""
        return block_count(self.manifest)

    def rows(self, block: int) -> slice:
        """The rows of a block; the last one of a view may be shorter."""
        return block_rows(self.manifest, block)

    def digests(self) -> NDArray[np.uint64]:
        """The digest of each block, [V, blocks]; 0: not labeled yet.

        Raises:
            FormatError: For a corrupt digest.
        """
        return self._block_digests(range(self.manifest.views.count))

    def template_digests(self) -> NDArray[np.uint64]:
        """The digest of each block's tail template, [blocks]; 0: none yet.

        Raises:
            FormatError: For a corrupt digest.
        """
        units = (template_unit(self.manifest, block) for block in range(self.blocks))
        return self._read_at_once({"template_digest": (slice(None),)}, units, self._digest)["template_digest"]

    def coverage(self) -> NDArray[np.int64]:
        """How many blocks of each view are labeled, int64 [V].

        This looks at the names of the digests, in a twentieth of the time that reading them takes; damage is noticed
        where a block is read.
        """
        views = [view for view, block in self._group.chunks("block_digest") if block < self.blocks]
        return np.bincount(np.array(views, np.int64), minlength=self.manifest.views.count)[: self.manifest.views.count]

    def is_block_labeled(self, view: int, block: int) -> bool:
        """Whether the codes of a block were committed."""
        return self._digest(block_unit(self.manifest, view, block)) != 0

    def has_template(self, block: int) -> bool:
        """Whether the tail template of a block's rows was committed."""
        return self._digest(template_unit(self.manifest, block)) != 0

    def write_block(self, view: int, block: int, codes: Codes) -> None:
        """Commit the codes of one block; it is labeled once this returns.

        A block that has the same codes already is left as it is.

        Raises:
            DataError: When it has others, and when the disk is full or refuses; it then still counts as not labeled.
        """
        k, classes, rows = self.manifest.top_k, self.manifest.classes, self.rows(block)
        n = rows.stop - rows.start
        shapes = (codes.index.shape, codes.gap.shape, codes.tail.shape)
        assert shapes == ((n, k), (n, k - 1), (n,)), f"codes of shapes {shapes} for {n} rows, k = {k}"
        assert codes.index.dtype == index_dtype(classes), f"index {codes.index.dtype} for {classes} classes"
        assert codes.index.max() < classes, f"class {codes.index.max()} of {classes}"
        self._commit(block_unit(self.manifest, view, block), code_arrays(codes))

    def write_template(self, block: int, template: NDArray[np.uint8]) -> None:
        """Commit the tail template of a block's rows, uint8 [rows, C]. Raises as `write_block` does."""
        rows = self.rows(block)
        assert template.shape == (rows.stop - rows.start, self.manifest.classes), f"template {template.shape}"
        assert template.dtype == np.uint8, f"template {template.dtype}"
        self._commit(template_unit(self.manifest, block), {"tail_template": template})

    def read_block(self, view: int, block: int) -> Codes:
        """The codes of one block, verified.

        Raises:
            DataError: When the block is not labeled.
            FormatError: When its chunks are corrupt, missing or another block's, or hold an index that is no class.
        """
        return codes_of(self._read(block_unit(self.manifest, view, block)))

    def read_view(self, view: int) -> Codes:
        """The codes of all N rows in one view, every block verified. Raises as `read_block` does."""
        assert 0 <= view < self.manifest.views.count, f"view {view} of {self.manifest.views.count}"
        [digests] = self._block_digests(range(view, view + 1))
        done = np.count_nonzero(digests)
        if done < self.blocks:
            raise DataError(
                f"{self.name}: view {view}: expected all {self.blocks} blocks labeled, found {done}; "
                "finish labeling first"
            )
        units = [block_unit(self.manifest, view, block) for block in range(self.blocks)]
        arrays = self._read_at_once({name: (view, slice(None)) for name in units[0].parts}, units, self._read)
        for block, unit in enumerate(units):
            with self._naming(unit):
                unit.check({name: array[self.rows(block)] for name, array in arrays.items()}, int(digests[block]))
        return codes_of(arrays)

    def read_rows(self, view: int, rows: NDArray[np.int64]) -> Codes:
        """The codes of some rows in one view, in the order asked for. Raises as `read_block` does.

        Only the blocks of these rows are read, and verified. `rows` is int64 [n]; a row may stand there more than once.
        """
        rows = np.asarray(rows, np.int64)
        assert ((rows >= 0) & (rows < self.manifest.samples)).all(), f"rows of {self.manifest.samples}"
        blocks = rows // self.manifest.block_rows
        order = np.argsort(blocks, kind="stable")
        parts = [
            self.read_block(view, int(block))[rows[blocks == block] - block * self.manifest.block_rows]
            for block in np.unique(blocks)
        ]
        return Codes.concatenate(parts)[np.argsort(order)]

    def read_template(self, block: int | None = None) -> NDArray[np.uint8]:
        """The tail template of a block's rows, or of all N: uint8 [rows, C], verified.

        Raises:
            DataError: When a block has none yet.
            FormatError: When it is corrupt, missing or another block's.
        """
        if block is not None:
            return self._read(template_unit(self.manifest, block))["tail_template"]
        template = np.empty((self.manifest.samples, self.manifest.classes), np.uint8)
        for block in range(self.blocks):
            template[self.rows(block)] = self.read_template(block)
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
        """Bytes stored for the codes of one labeled view of one image, on average, without its template.

        Args:
            digests: Those of all blocks, where they have been read already, which takes seconds for a large store.
        """
        digests = self.digests() if digests is None else digests
        rows = [self.rows(block) for block in range(self.blocks)]
        labeled = int(np.count_nonzero(digests, axis=0) @ [part.stop - part.start for part in rows])
        stored = self.stored_bytes()
        return sum(stored[name] for name in CODE_ARRAYS) / max(1, labeled)

    def _commit(self, unit: Unit, arrays: Arrays) -> None:
        digest, found = unit.digest(arrays), self._digest(unit)
        if found == digest:  # two writers of one unit are harmless when they agree
            return
        if found:
            raise DataError(
                f"{self.name}: {unit.name}: expected it not labeled yet, or with these labels, found another "
                "process's; they were kept: give each launch views of its own with --views"
            )
        for name, part in unit.parts.items():
            self._group.write(name, part, arrays[name])
        self._group.write(unit.digest_array, unit.position, digest)

    def _read(self, unit: Unit) -> Arrays:
        expected = self._digest(unit)
        with self._naming(unit):
            if expected == 0:
                raise DataError(f"expected {unit.content}, found none yet; finish labeling first")
            arrays = {name: self._group.read(name, part) for name, part in unit.parts.items()}
            unit.check(arrays, expected)
        return arrays

    def _digest(self, unit: Unit) -> int:
        with self._naming(unit):
            return int(self._group.read(unit.digest_array, unit.position))

    def _block_digests(self, views: range) -> NDArray[np.uint64]:
        units = (block_unit(self.manifest, view, block) for view in views for block in range(self.blocks))
        part = (slice(views.start, views.stop), slice(None))
        return self._read_at_once({"block_digest": part}, units, self._digest)["block_digest"]

    def _read_at_once(
        self, parts: Mapping[str, Selection], units: Iterable[Unit], read_one: Callable[[Unit], object]
    ) -> Arrays:
        """Parts of arrays that hold many units, one array at a time, which needs no second copy."""
        try:
            with error_context(self.name, "label again"):
                return {name: self._group.read(name, part) for name, part in parts.items()}
        except FormatError:
            for unit in units:
                read_one(unit)  # slower, and its error names the unit
            raise

    @contextmanager
    def _naming(self, unit: Unit) -> Generator[None]:
        """Errors inside say which unit they are about, and how to have it labeled again."""
        digest = self._group.chunk_file(unit.digest_array, *unit.position)
        with error_context(f"{self.name}: {unit.name}", f"delete {digest} and label again"):
            yield


def store_exists(address: str | Path) -> bool:
    """Whether there is a store to open. Raises DataError for an address that cannot be reached."""
    return locate(address).exists()


def create_store(
    address: str | Path,
    manifest: StoreManifest,
    keys: NDArray[np.uint64],
    crc32: NDArray[np.uint32],
    exist_ok: bool = False,
) -> Store:
    """A new store with nothing labeled: whole under its name, or not there.

    When another process makes one there at the same time, the first one counts and is opened.

    Args:
        address: A path, s3://bucket/path or gs://bucket/path.
        manifest: What its codes will depend on.
        keys: uint64 [N], the key digests of the packed images, in row order.
        crc32: uint32 [N], the CRC-32 of each.
        exist_ok: Open the store that has been there before, instead of refusing.

    Raises:
        DataError: When something is there already, or when the disk refuses.
    """
    assert keys.shape == crc32.shape == (manifest.samples,), f"{keys.shape}, {crc32.shape} for {manifest.samples} rows"
    assert (keys.dtype, crc32.dtype) == (np.uint64, np.uint32), f"{keys.dtype}, {crc32.dtype}"
    location = locate(address)
    if not exist_ok and location.exists():
        raise DataError(f"{address}: expected a free name for a new store, found one in use; remove it, or open it")
    create_group(location, manifest, {"key": keys, "crc32": crc32})
    return open_store(address)


def open_store(address: str | Path) -> Store:
    """Open a store for reading and for labeling; nothing is written, and codes are verified as they are read.

    Args:
        address: A path, s3://bucket/path or gs://bucket/path.

    Raises:
        DataError: When nothing is there, or when it cannot be reached.
        FormatError: For what is no store, a store of another version, a damaged manifest, arrays that are missing or
            not what the manifest says, and corrupt keys or checksums.
    """
    return Store(ZarrGroup(locate(address)))
