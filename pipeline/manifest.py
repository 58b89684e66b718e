"""Manifests: what a packed file or a store is, for the checks that guard its use."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.errors import DataError
from pipeline.recipe import Model, PackRecipe, ViewRecipe

LIBRARIES = ("ffcv", "numba", "numpy", "opencv-python", "timm", "torch", "zarr")


class PackManifest(Model):
    """Stands beside a .beton as NAME.manifest.json. The lists have one entry for each row, in row order."""

    format: Literal["softshard-beton"] = "softshard-beton"
    version: Literal[1] = 1
    recipe: PackRecipe
    beton_bytes: int
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    crc32: tuple[int, ...]
    sizes: tuple[int, ...]
    converted: int
    skipped: tuple[str, ...]
    libraries: dict[str, str]


class TeacherRecord(Model):
    model: str
    weights_digest: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weight: float


class StoreManifest(Model):
    """The attributes of a store's root group: everything its codes depend on."""

    format: Literal["softshard-labels"] = "softshard-labels"
    version: Literal[1] = 1
    samples: int = Field(ge=1)
    classes: int = Field(ge=2)
    top_k: int = Field(ge=1)
    block_rows: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    class_list_digest: str
    views: ViewRecipe
    teachers: tuple[TeacherRecord, ...]
    libraries: dict[str, str]


def key_digest(key: str) -> int:
    """The 64-bit digest of a sample's key: BLAKE2b with 8 bytes, read as a little-endian integer."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def key_digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    """Digests of all keys, uint64 [N]. Raises DataError when a key stands twice or two keys collide."""
    digests = np.fromiter((key_digest(key) for key in keys), np.uint64, len(keys))
    order = np.argsort(digests, kind="stable")
    again = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
    if len(again):
        first, second = keys[order[again[0]]], keys[order[again[0] + 1]]
        what = f"the key {first!r} twice" if first == second else f"the keys {first!r} and {second!r} with one digest"
        raise DataError(
            f"keys: expected a different 64-bit digest for each sample, found {what} ({len(again)} such pairs); "
            "rename or remove one of the two images"
        )
    return digests


def text_digest(lines: Sequence[str]) -> str:
    """One digest for an ordered list of names (the class list)."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def array_digest(*arrays: NDArray) -> int:
    """BLAKE2b, 8 bytes, over the raw bytes of C-contiguous arrays, one after the other; never 0."""
    state = hashlib.blake2b(digest_size=8)
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return int.from_bytes(state.digest(), "little") or 1


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}
