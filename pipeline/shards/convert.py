"""A store to WebDataset shards and back, without loss: the way back gives the store's files byte for byte.

One block of rows, with all of its views, is in memory at a time. Shards hold the samples in the order of the store's
rows. With a .beton the images and their hard labels stand beside the soft ones, under their own names.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.runtime.errors import DataError, FormatError, few
from softshard.pipeline.shards.format import (
    LABELS_SUFFIX,
    SampleLabels,
    ShardManifest,
    encode_sample,
    is_shards,
    open_shards,
)
from softshard.pipeline.shards.images import image_members, rows_of, sample_names
from softshard.pipeline.shards.reader import read_identities, read_shard, repeated_keys, shards_bytes
from softshard.pipeline.shards.writer import write_shards
from softshard.pipeline.store.store import Store, create_store, open_store, store_exists
from softshard.pipeline.store.topk import Codes, index_dtype


def convert(source: str, target: str, images: Path | None, shard_samples: int) -> str:
    """Make shards of a store, or a store of shards; one that an interrupted conversion left is continued.

    Args:
        source: A store (a path or an address), or a folder of shards.
        target: A new folder for shards, or a path or an address for a store.
        images: A .beton whose images go into the shards.
        shard_samples: Samples in each tar.

    Returns:
        What was made, for people.

    Raises:
        DataError: For a store that is not fully labeled, images that are not those of the labels, names that
            WebDataset cannot split, and a target in use.
        FormatError: For damage.
    """
    if not is_shards(source):
        return _to_shards(open_store(source), target, images, shard_samples)
    if images:
        raise DataError(
            f"--images: expected it with a store as the source, found shards in {source}; leave it out: "
            "the images of shards stay where they are"
        )
    return _to_store(Path(source), target)


def _to_shards(store: Store, target: str, images: Path | None, shard_samples: int) -> str:
    if shard_samples < 1:
        raise DataError(f"--shard-samples: expected at least 1, found {shard_samples}; correct it")
    folder, count = _free_folder(target), store.manifest.samples
    _check_labeled(store)
    samples = _with_images(store, images) if images else _without_images(store)
    bar = tqdm(samples, f"convert {store.name}", count, unit="img", mininterval=0.5)
    manifest = write_shards(folder, store.manifest, bar, shard_samples, images is not None)
    total = shards_bytes(folder, manifest)
    size = "" if images else f", {total / count / store.manifest.views.count:.1f} bytes a view"
    what = "samples with images" if images else "samples"
    return f"{store.name} -> {target}: {count} {what} in {len(manifest.shards)} shards, {total / 1e6:.1f} MB{size}"


def _free_folder(target: str) -> Path:
    if "://" in target:
        raise DataError(f"{target}: expected a folder for shards, found an address; name a folder and copy it there")
    folder = Path(target).resolve()
    if folder.exists() and (not folder.is_dir() or folder.is_mount() or any(folder.iterdir())):
        raise DataError(
            f"{target}: expected a new or empty folder for shards, found one in use; remove it, or name another"
        )
    return folder


def _check_labeled(store: Store) -> None:
    coverage, blocks = store.coverage(), store.blocks
    missing = np.flatnonzero(coverage < blocks)
    if len(missing):
        found = few([f"view {view} with {coverage[view]} of {blocks} blocks" for view in missing])
        raise DataError(
            f"{store.name}: expected all {len(coverage)} views labeled, found {found}; finish labeling first"
        )
    templates = np.count_nonzero(store.template_digests()) if store.manifest.template else blocks
    if templates < blocks:
        raise DataError(
            f"{store.name}: expected the tail template of all {blocks} blocks, found {templates}; finish labeling first"
        )


def _without_images(store: Store) -> Iterator[dict[str, bytes]]:
    for key, data in zip(store.keys.tolist(), _labels(store), strict=True):
        yield {f"{key:016x}{LABELS_SUFFIX}": data}


def _with_images(store: Store, path: Path) -> Iterator[dict[str, bytes]]:
    beton = open_beton(path)
    names, rows = sample_names(beton), rows_of(store, beton)
    parts = zip(rows.tolist(), image_members(beton, names, rows), _labels(store), strict=True)
    return (members | {names[row] + LABELS_SUFFIX: data} for row, members, data in parts)


def _labels(store: Store) -> Iterator[bytes]:
    """The .soft.bin of each row, in order."""
    return chain.from_iterable(_block_labels(store, block) for block in range(store.blocks))


def _block_labels(store: Store, block: int) -> Iterator[bytes]:
    rows, views = store.rows(block), store.manifest.views.count
    index, gap, tail = _empty_codes(store.manifest, (rows.stop - rows.start, views))
    for view in range(views):
        codes = store.read_block(view, block)
        index[:, view], gap[:, view], tail[:, view] = codes.index, codes.gap, codes.tail
    template = store.read_template(block) if store.manifest.template else [None] * len(tail)
    identities = zip(store.keys[rows].tolist(), store.crc32[rows].tolist(), strict=True)
    for (key, crc32), shape, *arrays in zip(identities, template, index, gap, tail, strict=True):
        yield encode_sample(SampleLabels(key, crc32, Codes(*arrays), shape))


def _empty_codes(
    manifest: StoreManifest, axes: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.uint8]]:
    """Index [*axes, K], gap [*axes, K - 1] and tail [*axes], yet to be filled."""
    index = np.empty((*axes, manifest.top_k), index_dtype(manifest.classes))
    return index, np.empty((*axes, manifest.top_k - 1), np.uint8), np.empty(axes, np.uint8)


def _to_store(folder: Path, target: str) -> str:
    manifest = open_shards(folder)
    labels = manifest.labels
    store = open_store(target) if store_exists(target) else None
    if store and store.manifest != labels:
        raise _in_use(target)  # before the work
    keys, crc32 = _columns(folder, manifest)
    store = store or create_store(target, labels, keys, crc32)
    if not (np.array_equal(store.keys, keys) and np.array_equal(store.crc32, crc32)):
        raise _in_use(target)
    samples = chain.from_iterable(read_shard(folder, shard, manifest) for shard in manifest.shards)
    samples = iter(tqdm(samples, f"convert {folder}", labels.samples, unit="img", mininterval=0.5))
    for block in range(store.blocks):
        _fill(store, block, samples)
    next(samples, None)  # the end, which the progress bar waits for
    size = f"{store.bytes_per_view():.1f} bytes a view"
    return f"{folder} -> {target}: {labels.views.count} views of {labels.samples} images, {size}"


def _in_use(target: str) -> DataError:
    return DataError(
        f"{target}: expected a free name for a new store, or one that these shards were being converted to, found "
        "another store; remove it, or name another"
    )


def _columns(folder: Path, manifest: ShardManifest) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Key and CRC-32 of all samples of a set, once all of it was found to be whole."""
    parts = []
    for part in read_identities(folder, manifest, "check"):
        if isinstance(part, str):
            raise FormatError(part)
        parts.append(part)
    for problem in repeated_keys(folder, parts):
        raise FormatError(problem)
    found = np.concatenate(parts)
    return np.ascontiguousarray(found["key"]), np.ascontiguousarray(found["crc32"])


def _fill(store: Store, block: int, samples: Iterator[SampleLabels]) -> None:
    """Write one block, with all of its views, from the next samples."""
    manifest, rows = store.manifest, store.rows(block)
    count, views = rows.stop - rows.start, manifest.views.count
    index, gap, tail = _empty_codes(manifest, (views, count))
    template = np.empty((count, manifest.classes) if manifest.template else 0, np.uint8)
    for row, sample in enumerate(islice(samples, count)):
        index[:, row], gap[:, row], tail[:, row] = sample.codes.index, sample.codes.gap, sample.codes.tail
        if sample.template is not None:
            template[row] = sample.template
    if manifest.template:
        store.write_template(block, template)
    for view in range(views):
        store.write_block(view, block, Codes(index[view], gap[view], tail[view]))
