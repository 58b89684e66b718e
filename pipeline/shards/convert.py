"""A store to WebDataset shards and back, without loss: the way back gives the store's files byte for byte.

One block of rows, with all of its views, is in memory at a time. Shards hold the samples in the order of the store's
rows. With a .beton the images and their hard labels stand beside the soft ones, under their own names.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.runtime.errors import DataError, FormatError, few
from softshard.pipeline.runtime.threads import in_order
from softshard.pipeline.shards.format import (
    LABELS_SUFFIX,
    REMEDY,
    SampleLabels,
    ShardManifest,
    ShardRecord,
    encode_sample,
    is_shards,
    open_shards,
    read_shard,
    shard_name,
    shards_bytes,
    write_manifest,
    write_shard,
)
from softshard.pipeline.shards.images import image_members, rows_of, sample_names
from softshard.pipeline.store.store import Store, create_store, open_store, store_exists
from softshard.pipeline.store.topk import Codes, index_dtype

IDENTITY = np.dtype([("key", np.uint64), ("crc32", np.uint32)])


def convert(source: str, target: str, images: Path | None, shard_samples: int) -> str:
    """Make shards of a store, or a store of shards, and say what was made.

    source: a store (a path or an address) or a folder of shards; images: a .beton whose images go into the shards;
    shard_samples: samples in each tar. A store that an interrupted conversion left is continued. Raises DataError for
    a store that is not fully labeled, images that are not those of the labels, names that WebDataset cannot split
    and a target in use; FormatError for damage.
    """
    if not is_shards(source):
        return _to_shards(open_store(source), target, images, shard_samples)
    if images:
        raise DataError(
            f"--images: expected it with a store as the source, found shards in {source}; leave it out: "
            "the images of shards stay where they are"
        )
    return _to_store(Path(source), target)


def verify_shards(folder: Path) -> list[str]:
    """Check the digest of each tar and each sample of a set; one line for each tar that is not whole, none for a whole
    set. Raises DataError for what cannot be read."""
    try:
        manifest = open_shards(folder)
    except FormatError as error:  # without it the rest means nothing
        return [str(error)]
    found = list(_scan(folder, manifest, "verify"))
    problems = [part for part in found if isinstance(part, str)]
    return problems + _repeated(folder, [part for part in found if not isinstance(part, str)])


def describe_shards(folder: Path) -> dict[str, Any]:
    """A set of shards as plain data. Raises FormatError for a damaged manifest and for missing tars."""
    manifest = open_shards(folder)
    return {
        "kind": "shards",
        "path": str(folder),
        "images": manifest.images,
        "shards": [shard.model_dump() for shard in manifest.shards],
        "bytes": shards_bytes(folder, manifest),
        "manifest": manifest.labels.model_dump(mode="json"),
    }


def _to_shards(store: Store, target: str, images: Path | None, shard_samples: int) -> str:
    if shard_samples < 1:
        raise DataError(f"--shard-samples: expected at least 1, found {shard_samples}; correct it")
    folder, count = _free_folder(target), store.manifest.samples
    _check_labeled(store)
    samples = _with_images(store, images) if images else _alone(store)
    bar = tqdm(samples, f"convert {store.name}", count, unit="img", mininterval=0.5)
    manifest, total = _write_shards(folder, store.manifest, bar, shard_samples, images is not None)
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


def _write_shards(
    folder: Path, labels: StoreManifest, samples: Iterable[dict[str, bytes]], shard_samples: int, images: bool
) -> tuple[ShardManifest, int]:
    """Write a set, which appears when it is whole. Returns its manifest and the bytes of its tars."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    paths = [unfinished / shard_name(number) for number in range(-(-labels.samples // shard_samples))]
    samples = iter(samples)  # each tar takes the next ones
    try:
        unfinished.mkdir(parents=True)
        shards = tuple(write_shard(path, islice(samples, shard_samples)) for path in paths)
        next(samples, None)  # the end, which the progress bar waits for
        manifest = ShardManifest(labels=labels, images=images, shards=shards)
        write_manifest(unfinished, manifest)
        total = shards_bytes(unfinished, manifest)
        unfinished.rename(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: expected to write shards, found: {error.strerror}; make room or check permissions"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest, total


def _alone(store: Store) -> Iterator[dict[str, bytes]]:
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
    index, gap, tail = _room(store.manifest, (rows.stop - rows.start, views))
    for view in range(views):
        codes = store.read_block(view, block)
        index[:, view], gap[:, view], tail[:, view] = codes.index, codes.gap, codes.tail
    template = store.read_template(block) if store.manifest.template else [None] * len(tail)
    identities = zip(store.keys[rows].tolist(), store.crc32[rows].tolist(), strict=True)
    for (key, crc32), shape, *arrays in zip(identities, template, index, gap, tail, strict=True):
        yield encode_sample(SampleLabels(key, crc32, Codes(*arrays), shape))


def _room(manifest: StoreManifest, axes: tuple[int, int]) -> tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.uint8]]:
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
    for part in _scan(folder, manifest, "check"):
        if isinstance(part, str):
            raise FormatError(part)
        parts.append(part)
    for problem in _repeated(folder, parts):
        raise FormatError(problem)
    found = np.concatenate(parts)
    return np.ascontiguousarray(found["key"]), np.ascontiguousarray(found["crc32"])


def _scan(folder: Path, manifest: ShardManifest, title: str) -> Iterator[NDArray[Any] | str]:
    """For each tar IDENTITY [samples], or what is wrong with it."""
    return in_order(partial(_scan_shard, folder, manifest), manifest.shards, len(manifest.shards), title, "tar")


def _scan_shard(folder: Path, manifest: ShardManifest, shard: ShardRecord) -> NDArray[Any] | str:
    try:
        samples = read_shard(folder, shard, manifest)
        return np.fromiter(((sample.key, sample.crc32) for sample in samples), IDENTITY)
    except FormatError as error:
        return str(error)


def _repeated(folder: Path, identities: Sequence[NDArray[Any]]) -> list[str]:
    keys = np.sort(np.concatenate([np.zeros(0, IDENTITY), *identities])["key"])
    again = keys[1:][keys[1:] == keys[:-1]]
    if not len(again):
        return []
    return [f"{folder}: expected a different key for each sample, found {again[0]:016x} more than once; {REMEDY}"]


def _fill(store: Store, block: int, samples: Iterator[SampleLabels]) -> None:
    """Write one block, with all of its views, from the next samples."""
    manifest, rows = store.manifest, store.rows(block)
    count, views = rows.stop - rows.start, manifest.views.count
    index, gap, tail = _room(manifest, (views, count))
    template = np.empty((count, manifest.classes) if manifest.template else 0, np.uint8)
    for row, sample in enumerate(islice(samples, count)):
        index[:, row], gap[:, row], tail[:, row] = sample.codes.index, sample.codes.gap, sample.codes.tail
        if sample.template is not None:
            template[row] = sample.template
    if manifest.template:
        store.write_template(block, template)
    for view in range(views):
        store.write_block(view, block, Codes(index[view], gap[view], tail[view]))
