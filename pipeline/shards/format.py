"""The format of shards: the labels of a store sample by sample in WebDataset tars, to share and to stream.

`NAME.soft.bin` holds all views of one sample. The tars are plain ones that stock WebDataset iterates, and
`decode_sample` is all it takes to read labels from them. A set of shards is a folder with its tars and one
manifest.json, which has the digest of each tar: damage is noticed before anything of a tar is looked at. The same
labels give the same bytes everywhere. The format is described in docs/format.md.
"""

import io
import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pydantic import Field, model_validator

from softshard.pipeline.images.manifest import StoreManifest, load_sealed, sealed
from softshard.pipeline.recipes.recipe import Model
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.topk import Codes, index_dtype

MANIFEST = "manifest.json"
LABELS_SUFFIX, CLASS_SUFFIX = ".soft.bin", ".cls"
MAGIC, CHECKSUM = b"\x28\xb5\x2f\xfd", 4  # of a zstd frame: how it starts, and the bit that says it has a checksum
HEAD = struct.Struct("<QI")  # key digest, CRC-32 of the image
CODEC = Zstd(level=9, checksum=True)
REMEDY = "copy or download it again"


class ShardRecord(Model):
    """A tar of the set; `digest` is BLAKE2b, 8 bytes, in hexadecimal, of the whole file."""

    name: str
    samples: Annotated[int, Field(ge=1)]
    digest: str


class ShardManifest(Model):
    """manifest.json of a set of shards.

    `labels` is the manifest of the store that the labels came from, `images` says whether each sample also has its
    image and its hard label.
    """

    format: Literal["softshard-shards"] = "softshard-shards"
    version: Literal[1] = 1
    labels: StoreManifest
    images: bool
    shards: tuple[ShardRecord, ...]

    @model_validator(mode="after")
    def _shards_hold_the_samples(self) -> "ShardManifest":
        if [shard.name for shard in self.shards] != [shard_name(number) for number in range(len(self.shards))]:
            raise ValueError(f"shards are named {shard_name(0)} and so on, in this order")
        if sum(shard.samples for shard in self.shards) != self.labels.samples:
            raise ValueError("shards and labels differ in the number of samples")
        return self


class SampleLabels(NamedTuple):
    """The labels of all V views of one image.

    Attributes:
        key: The image's key digest.
        crc32: The CRC-32 of its file.
        codes: Codes with the leading axis [V].
        template: The tail template, uint8 [C], where the labels have one.
    """

    key: int
    crc32: int
    codes: Codes
    template: NDArray[np.uint8] | None


def encode_sample(labels: SampleLabels) -> bytes:
    """The content of a .soft.bin."""
    codes, template = labels.codes, () if labels.template is None else (labels.template,)
    arrays = (codes.index, codes.gap, codes.tail, *template)
    return CODEC.encode(HEAD.pack(labels.key, labels.crc32) + b"".join(array.tobytes() for array in arrays))


def decode_sample(data: bytes, manifest: StoreManifest) -> SampleLabels:
    """The labels in a .soft.bin.

    Args:
        data: Its content.
        manifest: What the labels of its set come from (`ShardManifest.labels`).

    Returns:
        Codes with index uint16 or uint32 [V, K], gap uint8 [V, K - 1], tail uint8 [V].

    Raises:
        FormatError: For bytes that are not those of a sample with just these sizes, were damaged, or hold an index
            that is no class.
    """
    layout = _layout(manifest)
    ends = np.cumsum([HEAD.size, *(dtype.itemsize * math.prod(shape) for dtype, shape in layout)]).tolist()
    content = _decompressed(data, ends[-1])
    index, gap, tail, template = (
        np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
        for (dtype, shape), start in zip(layout, ends[:-1], strict=True)
    )
    if index.max() >= manifest.classes:
        raise FormatError(f"soft label: expected classes below {manifest.classes}, found {index.max()}; {REMEDY}")
    key, crc32 = HEAD.unpack_from(content)
    return SampleLabels(key, crc32, Codes(index, gap, tail), template if manifest.template else None)


def is_shards(path: str | Path) -> bool:
    """Whether this is a folder of shards, or what is left of one, rather than a store."""
    folder = Path(path)
    return (folder / MANIFEST).exists() or (folder / shard_name(0)).exists()


def shard_name(number: int) -> str:
    """The name of a tar in its set."""
    return f"labels-{number:06}.tar"


def open_shards(folder: Path) -> ShardManifest:
    """The manifest of a set of shards.

    Raises:
        FormatError: When it is missing, damaged or of another format.
        DataError: When it cannot be read.
    """
    path = folder / MANIFEST
    with open_file(path) as file:
        text = file.read()
    return load_sealed(ShardManifest, text, str(path), REMEDY)


def write_manifest(folder: Path, manifest: ShardManifest) -> None:
    """Write the manifest of a set into its folder."""
    # without spaces: any other byte instead of one would be the same document
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest), separators=(",", ":")))


def open_file(path: Path) -> io.BufferedReader:
    """A file of a set, to be read. Raises FormatError when it is missing, DataError when it cannot be read."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FormatError(f"{path}: expected a file of a set of shards, found none; {REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, found: {error.strerror}; check it") from None


def _layout(manifest: StoreManifest) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of index, gap, tail and template, one after the other in a .soft.bin."""
    views, k, template = manifest.views.count, manifest.top_k, manifest.classes if manifest.template else 0
    byte = np.dtype(np.uint8)
    return [(index_dtype(manifest.classes), (views, k)), (byte, (views, k - 1)), (byte, (views,)), (byte, (template,))]


def _decompressed(data: bytes, expected: int) -> bytearray:
    """The content of a frame, in memory that may be written to, as torch wants it."""
    found = _content_size(data)
    if found != expected:  # before any of it is allocated
        size = "something else" if found is None else f"one of {found} bytes"
        raise FormatError(
            f"soft label: expected a zstd frame of {expected} bytes with a checksum, found {size}; "
            f"{REMEDY}, or take the manifest that came with it"
        )
    content = bytearray(expected)  # also bounds what frames behind this one, of any size, can make it allocate
    try:
        CODEC.decode(data, content)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"soft label: expected an intact zstd frame, found: {error}; {REMEDY}") from None
    return content


def _content_size(data: bytes) -> int | None:
    """The size a zstd frame says its content has (RFC 8878, 3.1.1.1); None for anything but one with a checksum."""
    if len(data) < 6 or not data.startswith(MAGIC) or data[4] & 0x1F != CHECKSUM:
        return None
    single_segment = bool(data[4] & 0x20)
    width = (int(single_segment), 2, 4, 8)[data[4] >> 6]
    start = 5 if single_segment else 6  # otherwise the size of the window stands before
    size = int.from_bytes(data[start : start + width], "little")
    return None if width == 0 else size + 256 * (width == 2)
