"""Small stores for tests, with labels that are the same each time, and ways to look into them and to spoil them."""

import errno
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import settings
from numpy.typing import NDArray
from zarr.storage import LocalStore

from softshard.pipeline.images.manifest import StoreManifest, TeacherRecord, array_digest
from softshard.pipeline.recipes.recipe import TemplateRecipe, ViewRecipe
from softshard.pipeline.store.store import Store, create_store, open_store
from softshard.pipeline.store.topk import Codes, index_dtype
from softshard.pipeline.store.unit import code_arrays

CODE_ARRAYS = ("topk_index", "topk_gap", "tail")
SETTINGS = settings(derandomize=True, deadline=None, max_examples=15)


def make_manifest(
    samples: int = 10, classes: int = 7, k: int = 3, block_rows: int = 4, views: int = 2, template: int | None = None
) -> StoreManifest:
    teacher = TeacherRecord(
        model="resnet10t",
        library="timm",
        weights_digest="00",
        size=32,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        weight=1.0,
    )
    return StoreManifest(
        samples=samples,
        classes=classes,
        top_k=k,
        block_rows=block_rows,
        batch_size=2,
        class_list_digest="abc",
        views=ViewRecipe(seed=2**64 - 1, count=views),
        teachers=(teacher,),
        ensemble="probabilities",
        flip_average=False,
        template=TemplateRecipe(views=template) if template else None,
        precision="float32",
        channels_last=True,
        compile=False,
        probes=(),
        libraries={"zarr": "3"},
    )


def make_codes(manifest: StoreManifest, view: int) -> Codes:
    """The codes of a whole view: random, and the same for the same manifest and view."""
    rng = np.random.default_rng(view)
    n, k, classes = manifest.samples, manifest.top_k, manifest.classes
    index = rng.integers(classes - min(classes, 1000), classes, (n, k)).astype(index_dtype(classes))
    return Codes(index, rng.integers(0, 256, (n, k - 1), np.uint8), rng.integers(0, 256, n, np.uint8))


def make_template(manifest: StoreManifest) -> np.ndarray:
    """The tail template of all rows: random, and the same for the same manifest."""
    return np.random.default_rng(99).integers(0, 256, (manifest.samples, manifest.classes), np.uint8)


def missing(store: Store) -> list[tuple[int, int]]:
    return [(int(view), int(block)) for view, block in np.argwhere(store.digests() == 0)]


def create(path: Path | str, manifest: StoreManifest) -> Store:
    rng = np.random.default_rng(7)
    keys = rng.integers(0, 2**64, manifest.samples, np.uint64)
    return create_store(path, manifest, keys, rng.integers(0, 2**32, manifest.samples, np.uint32))


def fill(store: Store, blocks: list[tuple[int, int]] | None = None) -> None:
    """Label blocks, each a view and a number; None: all that are missing, and the templates."""
    for view, block in missing(store) if blocks is None else blocks:
        store.write_block(view, block, make_codes(store.manifest, view)[store.rows(block)])
    for block in range(store.blocks) if store.manifest.template and blocks is None else ():
        store.write_template(block, make_template(store.manifest)[store.rows(block)])


def assert_equal(found: Codes, expected: Codes) -> None:
    for name in ("index", "gap", "tail"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(a, b, strict=True)


def read_all(path: Path | str) -> None:
    store = open_store(path)
    for view in range(store.manifest.views.count):
        assert_equal(store.read_view(view), make_codes(store.manifest, view))
    if store.manifest.template:
        np.testing.assert_array_equal(store.read_template(), make_template(store.manifest), strict=True)


def plain_array(path: Path, name: str) -> zarr.Array:
    array = zarr.open_group(path, mode="r+")[name]
    assert isinstance(array, zarr.Array)
    return array


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def damaged_bytes(data: bytes) -> list[bytes]:
    positions = [i * (len(data) - 1) // 5 for i in range(6)]
    flipped = [data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :] for i in positions]
    return [*flipped, data[:-1], b"", bytes(len(data)), bytes(4)]


def refuse_writes(patch: pytest.MonkeyPatch, after: int) -> None:
    accept, left = LocalStore.set, [after]

    async def set_or_refuse(*args) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        await accept(*args)

    patch.setattr(LocalStore, "set", set_or_refuse)


def block_digest(view: int, block: int, codes: Codes) -> int:
    """As docs/format.md describes it."""
    return array_digest(np.array([view, block], np.uint64), *code_arrays(codes).values())


def template_digest(block: int, template: NDArray[np.uint8]) -> int:
    return array_digest(np.array([block], np.uint64), template)
