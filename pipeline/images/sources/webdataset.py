"""WebDataset tars: which samples they hold, and where in the file each image is.

Headers and class numbers are read, images later, by their offset. Nothing is unpickled or executed: members that are
neither an image nor a class number are passed over.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from softshard.pipeline.images.sources.contract import IMAGE_SUFFIXES, Sample, Source, check_label, numbered_classes
from softshard.pipeline.runtime.errors import DataError, FormatError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
TAR_BLOCK = 512


class TarImage(NamedTuple):
    """An image in a tar: its name there, where its bytes are, and its class."""

    shard: Path
    name: str
    label: int
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the image, from the tar."""
        with self.shard.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def split_member_name(name: str) -> tuple[str, str]:
    """The name of a member's sample, and its suffix: WebDataset splits at the first dot of the last part.

    Returns:
        ("a.b/one", ".seg.png") for "a.b/one.seg.png"; an empty suffix where there is no dot, a last part of the name
        that is empty for a hidden file.
    """
    folder, slash, last = name.rpartition("/")
    sample, dot, suffix = last.partition(".")
    return f"{folder}{slash}{sample}", f"{dot}{suffix}"


def webdataset(shards: list[Path], names: list[str] | None) -> Source:
    """WebDataset tars with KEY.jpg (or .png, .webp, ...) and KEY.cls, as timm's ImageNet shards, in the tars' order.

    A sample's key is the name of its image in the tar.

    Raises:
        DataError: for tars without samples, keys that several of them have, and class numbers out of range.
        FormatError: for damaged tars.
    """
    index = tqdm(shards, "index", unit="tar", mininterval=0.5)
    images = [image for shard in index for image in tar_images(shard, IMAGE_SUFFIXES)]
    if not images:
        raise DataError(f"{shards[0]}: expected samples (KEY.jpg and KEY.cls), found none; check source.path")
    shard_of: dict[str, Path] = {}
    for image in images:
        if shard_of.setdefault(image.name, image.shard) != image.shard:
            raise DataError(
                f"{image.shard}: expected keys that no other shard has, found {image.name!r} in "
                f"{shard_of[image.name]} too; write the shards with keys that are unique in the data set"
            )
    classes = names or numbered_classes(max(image.label for image in images))
    for image in images:
        check_label(image.label, classes, f"{image.shard}: {image.name}")
    samples = (Sample(image.name, image.label, f"{image.shard}: {image.name}", image.read) for image in images)
    sizes = [image.size for image in images]
    return Source(classes, [image.name for image in images], sum(sizes), max(sizes), samples)


def tar_images(shard: Path, suffixes: set[str]) -> list[TarImage]:
    """The image of each sample, in the tar's order; `suffixes` are those of images (".jpg").

    Raises:
        FormatError: for a tar that is compressed, truncated or damaged.
        DataError: for a sample that has not exactly one image and one class number.
    """
    samples: dict[str, tuple[list[tarfile.TarInfo], list[tarfile.TarInfo]]] = {}
    with shard.open("rb") as file:
        for member in _members(shard, file):
            member.name = member.name.removeprefix("./")
            name, suffix = split_member_name(member.name)
            if not suffix or not _names_a_sample(name) or not member.isreg() or member.issparse():
                continue
            images, labels = samples.setdefault(name, ([], []))
            if suffix.lower() == ".cls":
                labels.append(member)
            elif suffix.lower() in suffixes:
                images.append(member)
        return [_image(shard, file, key, *parts) for key, parts in samples.items()]


def _names_a_sample(name: str) -> bool:
    """Hidden files are no samples, nor are files in folders whose names have more than one line."""
    folder, _, last = name.rpartition("/")
    return bool(last) and "\n" not in folder


def _image(
    shard: Path, file: BinaryIO, key: str, images: list[tarfile.TarInfo], labels: list[tarfile.TarInfo]
) -> TarImage:
    if (len(images), len(labels)) != (1, 1):
        raise DataError(
            f"{shard}: {key}: expected one image and one .cls, found {len(images)} and {len(labels)}; "
            "write the shard again, or leave it out of source.path"
        )
    [image], [number] = images, labels
    label = _class_number(f"{shard}: {number.name}", file, number)
    return TarImage(shard, image.name, label, image.offset_data, image.size)


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    start = os.pread(file.fileno(), 8, 0)
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise FormatError(f"{shard}: expected a tar without compression, found {kind}; decompress it first")
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
            # tarfile takes a damaged header for the end; behind the real end there are zeros only
            rest = os.pread(file.fileno(), 1 << 16, tar.offset)
    except tarfile.TarError as error:
        raise FormatError(f"{shard}: expected a whole tar, found: {error}; copy or download it again") from None
    if len(rest) < TAR_BLOCK or rest.strip(b"\0"):
        what = "no end" if len(rest) < TAR_BLOCK else "something that is no member"
        raise FormatError(
            f"{shard}: expected a whole tar, found {what} at byte {tar.offset}; copy or download it again"
        )


def _class_number(where: str, file: BinaryIO, member: tarfile.TarInfo) -> int:
    text = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
    if member.size > 32 or not re.fullmatch(rb"\s*\d{1,18}\s*", text):
        raise DataError(f"{where}: expected a class number from 0 on, found {text!r}; correct it in the shard")
    return int(text)
