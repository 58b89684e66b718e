"""Reading shards: every tar and every sample is checked."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import key_digest
from softshard.pipeline.images.sources.webdataset import split_member_name
from softshard.pipeline.runtime.errors import FormatError
from softshard.pipeline.runtime.threads import in_order
from softshard.pipeline.shards.format import (
    CLASS_SUFFIX,
    LABELS_SUFFIX,
    REMEDY,
    SampleLabels,
    ShardManifest,
    ShardRecord,
    decode_sample,
    open_file,
)

IDENTITY = np.dtype([("key", np.uint64), ("crc32", np.uint32)])


def read_shard(folder: Path, shard: ShardRecord, manifest: ShardManifest) -> Iterator[SampleLabels]:
    """The samples of a tar, in order, every one checked, after the digest of the whole tar.

    Raises:
        FormatError: When the tar is missing or damaged, or holds other samples or members than it should.
        DataError: When it cannot be read.
    """
    path, count = folder / shard.name, 0
    with open_file(path) as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
        if found != shard.digest:
            raise FormatError(f"{path}: expected a file with digest {shard.digest}, found {found}; {REMEDY}")
        for name, members in _samples(path, file):
            count += 1
            try:
                yield _checked(name, members, manifest)
            except FormatError as error:
                raise FormatError(f"{path}: {name}: {error}") from None
    if count != shard.samples:
        raise FormatError(f"{path}: expected {shard.samples} samples, found {count}; {REMEDY}")


def shards_bytes(folder: Path, manifest: ShardManifest) -> int:
    """Bytes of all tars together. Raises FormatError when one is missing."""
    total = 0
    for shard in manifest.shards:
        with open_file(folder / shard.name) as file:
            total += file.seek(0, 2)
    return total


def read_identities(folder: Path, manifest: ShardManifest, title: str) -> Iterator[NDArray[Any] | str]:
    """Read a whole set, with a progress bar of that title.

    Returns:
        For each tar the IDENTITY [samples] of its samples, or what is wrong with it.

    Raises:
        DataError: For a tar that cannot be read.
    """
    return in_order(partial(_read_identities, folder, manifest), manifest.shards, len(manifest.shards), title, "tar")


def repeated_keys(folder: Path, identities: Sequence[NDArray[Any]]) -> list[str]:
    """A line that says which key more than one sample of a set has; none where all differ.

    Args:
        folder: The set, for the message.
        identities: IDENTITY [samples] of each tar.
    """
    keys = np.sort(np.concatenate([np.zeros(0, IDENTITY), *identities])["key"])
    again = keys[1:][keys[1:] == keys[:-1]]
    if not len(again):
        return []
    return [f"{folder}: expected a different key for each sample, found {again[0]:016x} more than once; {REMEDY}"]


def _read_identities(folder: Path, manifest: ShardManifest, shard: ShardRecord) -> NDArray[Any] | str:
    try:
        samples = read_shard(folder, shard, manifest)
        return np.fromiter(((sample.key, sample.crc32) for sample in samples), IDENTITY)
    except FormatError as error:
        return str(error)


def _checked(name: str, members: dict[str, bytes], manifest: ShardManifest) -> SampleLabels:
    """The labels of a sample whose members are all there, fit each other, and are no more than they should be."""
    found = ", ".join(members)
    if name + LABELS_SUFFIX not in members:
        raise FormatError(f"expected a member {name}{LABELS_SUFFIX}, found {found}; {REMEDY}")
    labels = decode_sample(members[name + LABELS_SUFFIX], manifest.labels)
    fits = _is_with_image if manifest.images else _is_alone
    if not fits(labels, name, members):
        what = "with their image and its class" if manifest.images else "alone, under that name"
        raise FormatError(f"expected the labels of key {labels.key:016x} {what}, found {found}; {REMEDY}")
    return labels


def _is_alone(labels: SampleLabels, name: str, members: dict[str, bytes]) -> bool:
    return name == f"{labels.key:016x}" and len(members) == 1


def _is_with_image(labels: SampleLabels, name: str, members: dict[str, bytes]) -> bool:
    images = members.keys() - {name + LABELS_SUFFIX, name + CLASS_SUFFIX}
    if (len(images), len(members)) != (1, 3):
        return False
    [image] = images
    return key_digest(image) == labels.key and zlib.crc32(members[image]) == labels.crc32


def _samples(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each sample by name, after the sample's name, grouped as WebDataset does it."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar:
            for name, members in groupby(tar, lambda member: split_member_name(member.name)[0]):
                yield name, {member.name: _content(file, member) for member in members}
    except (tarfile.TarError, ValueError) as error:
        raise FormatError(f"{path}: expected a tar of labels, found: {error}; {REMEDY}") from None


def _content(file: io.BufferedReader, member: tarfile.TarInfo) -> bytes:
    room = file.seek(0, 2) - member.offset_data
    if not member.isreg() or member.issparse() or not 0 <= member.size <= room:
        raise ValueError(f"a member {member.name!r} that is no whole file")
    file.seek(member.offset_data)
    return file.read(member.size)
