"""Units: what is committed to a store at once, and which part of which arrays it is.

There are two kinds: a block, the codes of one view of `block_rows` rows, and the tail template of such rows. A unit's
arrays are written first and its digest last.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import StoreManifest, array_digest
from softshard.pipeline.runtime.errors import FormatError
from softshard.pipeline.store.topk import Codes

CODE_ARRAYS = ("topk_index", "topk_gap", "tail")
Arrays = dict[str, NDArray[Any]]  # by their names in a store
Selection = tuple[int | slice, ...]


class Unit(NamedTuple):
    """Where a unit lies in its store.

    Attributes:
        name: For messages.
        content: What it holds, for messages.
        parts: The part of each array that it fills, in the order of its digest.
        digest_array: The array that holds its digest.
        position: Of its digest there; the digest covers it, too.
        classes: The store's number of classes.
    """

    name: str
    content: str
    parts: Mapping[str, Selection]
    digest_array: str
    position: tuple[int, ...]
    classes: int

    def digest(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """BLAKE2b, 8 bytes, over the unit's position and content; never 0, which means not labeled."""
        return _digest(self.position, (arrays[name] for name in self.parts))

    def check(self, arrays: Mapping[str, NDArray[Any]], expected: int) -> None:
        """Raise FormatError for arrays that have another digest, or an index that is no class."""
        found = self.digest(arrays)
        if found != expected:
            raise FormatError(f"expected content with digest {expected:016x}, found {found:016x}")
        if "topk_index" in arrays and (largest := arrays["topk_index"].max()) >= self.classes:
            raise FormatError(f"expected classes below {self.classes}, found {largest}")


def block_count(manifest: StoreManifest) -> int:
    """The number of blocks of each view."""
    return -(-manifest.samples // manifest.block_rows)


def block_rows(manifest: StoreManifest, block: int) -> slice:
    """The rows of a block; the last one of a view may be shorter."""
    assert 0 <= block < block_count(manifest), f"block {block} of {block_count(manifest)}"
    first = block * manifest.block_rows
    return slice(first, min(first + manifest.block_rows, manifest.samples))


def block_unit(manifest: StoreManifest, view: int, block: int) -> Unit:
    """The codes of one block; k = 1 has no gaps."""
    assert 0 <= view < manifest.views.count, f"view {view} of {manifest.views.count}"
    names = CODE_ARRAYS if manifest.top_k > 1 else ("topk_index", "tail")
    parts: dict[str, Selection] = {name: (view, block_rows(manifest, block)) for name in names}
    return Unit(f"view {view}, block {block}", "soft labels", parts, "block_digest", (view, block), manifest.classes)


def template_unit(manifest: StoreManifest, block: int) -> Unit:
    """The tail template of a block's rows."""
    assert manifest.template, "a store without a template"
    parts: dict[str, Selection] = {"tail_template": (block_rows(manifest, block), slice(None))}
    return Unit(f"tail template, block {block}", "a template", parts, "template_digest", (block,), manifest.classes)


def code_arrays(codes: Codes) -> Arrays:
    """The arrays of codes by their names in a store; k = 1 has no gaps."""
    arrays = zip(CODE_ARRAYS, (codes.index, codes.gap, codes.tail), strict=True)
    return {name: values for name, values in arrays if values.size}


def codes_of(arrays: Mapping[str, NDArray[Any]]) -> Codes:
    """What `code_arrays` gives as codes again."""
    index, tail = arrays["topk_index"], arrays["tail"]
    return Codes(index, arrays.get("topk_gap", np.zeros((len(tail), 0), np.uint8)), tail)


def _digest(position: tuple[int, ...], arrays: Iterable[NDArray[Any]]) -> int:
    return array_digest(np.array(position, np.uint64), *arrays)
