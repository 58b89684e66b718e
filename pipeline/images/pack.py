"""images -> .beton: read, check, convert where needed, write with a manifest.

Upright 8-bit gray or RGB JPEGs keep their bytes. Everything else becomes an RGB JPEG of quality 95 without chroma
subsampling, showing what PIL and ImageOps.exif_transpose see. The manifest counts conversions by their reason, each
image once, under the first that applies:

    16-bit       gray with 16 bits, in any format: scaled to 8 bits
    png, ...     the format, when it is not JPEG: png, webp, tiff, bmp, ppm, ...
    cmyk         a JPEG with four colors
    rotated      a JPEG whose EXIF orientation is not upright
    oversize     a JPEG larger than `max_side`
    refused      a JPEG that PIL reads and the decoder of training refuses
"""

import io
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from softshard.pipeline.images.beton import PackedImage, manifest_path, tables_crc32, write_beton
from softshard.pipeline.images.jpeg import decodes
from softshard.pipeline.images.manifest import PackManifest, key_digests, library_versions, sealed
from softshard.pipeline.images.sources import open_source
from softshard.pipeline.images.sources.contract import Sample, Source
from softshard.pipeline.recipes.recipe import PackRecipe
from softshard.pipeline.recipes.yaml_file import save_recipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import atomic_path
from softshard.pipeline.runtime.threads import in_order

ORIENTATION = 0x0112
JPEG_QUALITY = 95


class Converted(NamedTuple):
    """A JPEG as it goes into the file, with its size; `reason` says why it is not the source's bytes, None if it is."""

    jpeg: bytes
    width: int
    height: int
    reason: str | None


class BadImage(Exception):
    """An image that does not decode, with the reason."""


@dataclass
class _Log:
    """What the manifest says about the rows, collected while they stream to the file."""

    keys: list[str] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


def pack(recipe: PackRecipe) -> PackManifest:
    """Pack an image data set; the .beton and its manifest replace older ones only when both are whole.

    Raises DataError for a source that is missing, empty or contradicts itself or the class list, duplicate keys, no
    room on the disk, and an image that does not decode (unless `on_bad_image: skip`); FormatError for a damaged tar or
    parquet file; OSError when reading or writing fails.
    """
    source = open_source(recipe.source, None if recipe.classes is None else Path(recipe.classes))
    key_digests(source.keys)
    output, log = Path(recipe.output), _Log()
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output, source.total)
    with atomic_path(manifest_path(output)) as partial_manifest, atomic_path(output) as partial:
        beton_bytes = write_beton(partial, _images(recipe, source, log), len(source.keys), source.largest)
        if not log.keys:
            raise DataError(
                f"{recipe.source.path}: expected at least one image that decodes, found none of {len(source.keys)}"
            )
        manifest = PackManifest(
            recipe=recipe,
            beton_bytes=beton_bytes,
            tables_crc32=tables_crc32(partial, len(log.keys)),
            classes=tuple(source.classes),
            keys=tuple(log.keys),
            crc32=tuple(log.crc32),
            sizes=tuple(log.sizes),
            converted=dict(sorted(log.converted.items())),
            skipped=tuple(log.skipped),
            libraries=library_versions(),
        )
        partial_manifest.write_text(json.dumps(sealed(manifest)), encoding="utf-8")
        manifest_path(output).unlink(missing_ok=True)  # a crash between the two must not leave a pair that disagrees
    save_recipe(recipe, output.with_suffix(".recipe.yaml"))
    return manifest


def encode(data: bytes, max_side: int | None) -> Converted:
    """An image of any format that PIL reads, as a JPEG that keeps its bytes if it can. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            reason = _reason(image, data, max_side)
            if reason is None:
                return Converted(data, image.width, image.height, None)
            rgb = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        if max_side is not None:
            rgb.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        rgb.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return Converted(stream.getvalue(), rgb.width, rgb.height, reason)
    except Exception as error:  # PIL raises nearly anything on broken files
        raise BadImage(str(error) or type(error).__name__) from None


def _reason(image: Image.Image, data: bytes, max_side: int | None) -> str | None:
    """The first reason to convert an image, or None; in the order of this module's list."""
    if image.mode.startswith("I"):
        return "16-bit"
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with others behind it
        return str(image.format).lower()
    if image.mode not in ("L", "RGB"):
        return image.mode.lower()
    if image.getexif().get(ORIENTATION, 1) != 1:
        return "rotated"
    if max_side is not None and max(image.size) > max_side:
        return "oversize"
    return None if decodes(data, image.height, image.width) else "refused"


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image with PIL's 16-bit gray samples scaled to 8 bits (PIL would clip them); others as they are.

    Mode I has 32 bits; PIL reads 16-bit PGM and signed TIFF files as such, so that its samples decide.
    """
    if image.mode == "F":
        raise ValueError("its samples are floating-point numbers")
    if not image.mode.startswith("I"):
        return image
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 65535:
        raise ValueError(f"its samples have more than 16 bits: from {samples.min()} to {samples.max()}")
    return Image.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _images(recipe: PackRecipe, source: Source, log: _Log) -> Iterator[PackedImage]:
    def read(sample: Sample) -> tuple[Sample, tuple[Converted, int] | BadImage]:
        try:
            encoded = encode(sample.read(), recipe.max_side)
            return sample, (encoded, zlib.crc32(encoded.jpeg))
        except BadImage as error:
            return sample, error

    for sample, result in in_order(read, source.samples, len(source.keys), f"pack {recipe.output}", "img"):
        if isinstance(result, BadImage):
            if recipe.on_bad_image == "error":
                raise DataError(
                    f"{sample.where}: expected an image, found one that does not decode ({result}); "
                    "remove it, or set on_bad_image: skip"
                )
            log.skipped.append(sample.key)
            continue
        encoded, crc32 = result
        log.keys.append(sample.key)
        log.crc32.append(crc32)
        log.sizes.append(len(encoded.jpeg))
        if encoded.reason is not None:
            log.converted[encoded.reason] += 1
        yield PackedImage(encoded.jpeg, encoded.width, encoded.height, sample.label)


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise DataError(f"{output}: expected {needed / 1e6:.0f} MB of free disk, found {free / 1e6:.0f} MB; make room")
