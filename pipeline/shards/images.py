"""The images that stand beside their labels in shards, under their own names, so that the tars can be packed again."""

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import match_keys, text_digest
from softshard.pipeline.images.sources.contract import IMAGE_SUFFIXES
from softshard.pipeline.runtime.errors import DataError, FormatError, few
from softshard.pipeline.shards.format import CLASS_SUFFIX
from softshard.pipeline.store.store import Store

# a name and its suffix as WebDataset takes them: it splits at the first dot of the base name
IMAGE_NAME = re.compile(r"(?!\./)((?:[^\0\n]*/)?[^./\0\n]+)(\.[^./\0\n]+)")


def sample_names(beton: Beton) -> list[str]:
    """The key of each image without its suffix. Raises DataError for keys that WebDataset would not split there, and
    for some that differ in their suffix alone."""
    keys = beton.manifest.keys
    found = [IMAGE_NAME.fullmatch(key) for key in keys]
    names = [match[1] if match and match[2].lower() in IMAGE_SUFFIXES else "" for match in found]
    counts = Counter(names)
    bad = [key for key, name in zip(keys, names, strict=True) if not name or counts[name] > 1]
    if bad:
        raise DataError(
            f"{beton.path}: expected keys with one dot, before the suffix of an image, and different without it, as "
            f"WebDataset splits them, found {few([*map(repr, bad)])}; rename and pack again, or convert without "
            "--images"
        )
    return names


def rows_of(store: Store, beton: Beton) -> NDArray[np.int64]:
    """The row of the .beton for each row of the store, int64 [N]. Raises DataError unless it has just its images."""
    if text_digest(beton.manifest.classes) != store.manifest.class_list_digest:
        raise DataError(f"{beton.path}: expected the class list of {store.name}, found another; give its own .beton")
    rows = match_keys(beton.keys, store.keys)
    known = rows >= 0
    missing, unlabeled = int((~known).sum()), len(beton) - int(known.sum())
    changed = int((beton.crc32[rows] != store.crc32)[known].sum())
    if missing or unlabeled or changed:
        raise DataError(
            f"{beton.path}: expected just the {len(store.keys)} images that {store.name} labels, found {missing} "
            f"missing, {unlabeled} without labels, {changed} with other content; give the .beton it was made from"
        )
    return rows


def image_members(beton: Beton, names: list[str], rows: NDArray[np.int64]) -> Iterator[dict[str, bytes]]:
    """For each of some rows, the image and its class number by their names in a tar. Raises FormatError for damaged
    images."""
    with beton.path.open("rb") as file:
        for row in rows.tolist():
            key, number = beton.manifest.keys[row], str(beton.labels[row]).encode()
            jpeg = os.pread(file.fileno(), int(beton.lengths[row]), int(beton.offsets[row]))
            found, expected = zlib.crc32(jpeg), int(beton.crc32[row])
            if found != expected:
                raise FormatError(
                    f"{beton.path}: {key}: expected CRC-32 {expected:08x}, found {found:08x}; copy the file again"
                )
            yield {key: jpeg, names[row] + CLASS_SUFFIX: number}
