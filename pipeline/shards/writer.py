"""Writing shards: the same samples give the same bytes, and a set appears when it is whole."""

import hashlib
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.images.sources.webdataset import TAR_BLOCK
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import atomic_path
from softshard.pipeline.shards.format import ShardManifest, ShardRecord, shard_name, write_manifest


def write_shards(
    folder: Path, labels: StoreManifest, samples: Iterable[dict[str, bytes]], shard_samples: int, images: bool
) -> ShardManifest:
    """Write a set of shards.

    Args:
        folder: Where the set appears; nothing, or an empty folder.
        labels: The manifest of the store that the labels come from.
        samples: The members of each sample by name, in order.
        shard_samples: Samples in each tar.
        images: Whether the samples have their images.

    Raises:
        DataError: When the disk is full or refuses.
    """
    samples = iter(samples)  # each tar takes the next ones
    try:
        with atomic_path(folder) as unfinished:
            unfinished.mkdir()
            paths = [unfinished / shard_name(number) for number in range(-(-labels.samples // shard_samples))]
            shards = tuple(write_shard(path, islice(samples, shard_samples)) for path in paths)
            next(samples, None)  # the end, which a progress bar waits for
            manifest = ShardManifest(labels=labels, images=images, shards=shards)
            write_manifest(unfinished, manifest)
    except OSError as error:
        raise DataError(
            f"{folder}: expected to write shards, found: {error.strerror}; make room or check permissions"
        ) from error
    return manifest


def write_shard(path: Path, samples: Iterable[dict[str, bytes]]) -> ShardRecord:
    """Write a tar of some samples, each its members by name; the same samples give the same bytes."""
    digest, count = hashlib.blake2b(digest_size=8), 0
    with path.open("wb") as file:
        for members in samples:
            count += 1
            data = b"".join(_tar_member(name, members[name]) for name in sorted(members))
            file.write(data)
            digest.update(data)
        end = bytes(2 * TAR_BLOCK)
        file.write(end)
        digest.update(end)
    return ShardRecord(name=path.name, samples=count, digest=digest.hexdigest())


def _tar_member(name: str, data: bytes) -> bytes:
    """A header with nothing in it but the name and the size, and the data; PAX where a name is long or not ASCII."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8") + data + bytes(-len(data) % TAR_BLOCK)
