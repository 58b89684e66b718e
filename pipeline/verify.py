"""Check that a packed file, a store or shards are whole: every checksum, every image in full, every labeled block."""

import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from softshard.pipeline.images.beton import Beton, is_beton, open_beton, padding
from softshard.pipeline.images.jpeg import decodes
from softshard.pipeline.runtime.errors import FormatError, SoftshardError
from softshard.pipeline.runtime.report import Report
from softshard.pipeline.runtime.threads import in_order
from softshard.pipeline.shards.format import is_shards, open_shards
from softshard.pipeline.shards.reader import read_identities, repeated_keys
from softshard.pipeline.store.store import Store, open_store


def verify(path: str | Path) -> Report:
    """Check a .beton, shards, or a store.

    Args:
        path: A path, or an address of a store.

    Raises:
        DataError: When there is nothing to read.
    """
    if is_shards(path):
        return Report("shards", _shards_problems(Path(path)))
    try:
        return _verify_beton(open_beton(path)) if is_beton(path) else _verify_store(open_store(path))
    except FormatError as error:  # tables, manifests and keys: without them the rest means nothing
        return Report("the rest was not checked", [str(error)])


def _verify_beton(beton: Beton) -> Report:
    with beton.path.open("rb") as file:
        found = in_order(lambda row: _image_problem(beton, file, row), range(len(beton)), len(beton), "verify", "img")
        problems = [problem for problem in found if problem]
        problems += [problem for gap in padding(beton) if (problem := _padding_problem(beton, file, gap))]
    return Report(f"{len(beton)} images", problems)


def _padding_problem(beton: Beton, file: BinaryIO, gap: slice) -> str | None:
    where = f"{beton.path}: bytes {gap.start} to {gap.stop}, where no image is"
    try:
        if any(os.pread(file.fileno(), gap.stop - gap.start, gap.start)):
            return f"{where}: expected zeros, found others; copy the file again"
    except OSError as error:
        return f"{where}: expected to read them, found: {error.strerror}; copy the file again"
    return None


def _image_problem(beton: Beton, file: BinaryIO, row: int) -> str | None:
    key, height, width = beton.manifest.keys[row], int(beton.heights[row]), int(beton.widths[row])
    try:
        jpeg = os.pread(file.fileno(), int(beton.lengths[row]), int(beton.offsets[row]))
    except OSError as error:
        return f"{key}: expected to read it, found: {error.strerror}; copy the file again"
    if zlib.crc32(jpeg) != beton.crc32[row]:
        return f"{key}: expected CRC-32 {beton.crc32[row]:08x}, found {zlib.crc32(jpeg):08x}; copy the file again"
    if not decodes(jpeg, height, width):
        return f"{key}: expected a JPEG of {width} x {height} pixels, found one that does not decode; pack again"
    return None


def _verify_store(store: Store) -> Report:
    blocks = list(np.ndindex(store.manifest.views.count, store.blocks))
    found = list(in_order(lambda block: _block_problem(store, *block), blocks, len(blocks), "verify", "block"))
    labeled = sum(problem is not None for problem in found)
    checked = f"{labeled} of {len(blocks)} blocks labeled"
    if store.manifest.template:
        templates = [_template_problem(store, block) for block in range(store.blocks)]
        checked += f", {sum(problem is not None for problem in templates)} of {store.blocks} templates"
        found += templates
    return Report(checked, [problem for problem in found if problem])


def _shards_problems(folder: Path) -> list[str]:
    try:
        manifest = open_shards(folder)
    except FormatError as error:  # without it the rest means nothing
        return [str(error)]
    found = list(read_identities(folder, manifest, "verify"))
    problems = [part for part in found if isinstance(part, str)]
    return problems + repeated_keys(folder, [part for part in found if not isinstance(part, str)])


def _block_problem(store: Store, view: int, block: int) -> str | None:
    return _problem(partial(store.is_block_labeled, view, block), partial(store.read_block, view, block))


def _template_problem(store: Store, block: int) -> str | None:
    return _problem(partial(store.has_template, block), partial(store.read_template, block))


def _problem(is_there: Callable[[], bool], read: Callable[[], object]) -> str | None:
    """None: not labeled yet. Empty: whole."""
    try:
        if not is_there():
            return None
        read()
    except SoftshardError as error:
        return str(error)
    return ""
