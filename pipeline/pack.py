"""images -> .beton: read, check, convert where needed, write with a manifest."""

import io
import os
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.beton import PackedImage, decodes, manifest_path, tables_crc32, write_beton
from pipeline.errors import DataError
from pipeline.files import atomic_path
from pipeline.manifest import PackManifest, key_digests, library_versions
from pipeline.recipe import PackRecipe, save_recipe

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's list
ORIENTATION = 0x0112
JPEG_QUALITY = 95

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sample(NamedTuple):
    """An image of the source: its key, its class and where its bytes are."""

    key: str
    label: int
    path: Path


class BadImage(Exception):
    """An image that does not decode, with the reason."""


@dataclass
class _Log:
    """What the manifest says about the rows, collected while they stream to the file."""

    keys: list[str] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    converted: int = 0


def pack(recipe: PackRecipe) -> PackManifest:
    """Pack an image data set; the .beton and its manifest replace older ones only when both are whole.

    Raises DataError for a missing or empty folder, a class that is not in the class list, duplicate keys, no room on
    the disk, and an image that does not decode (unless `on_bad_image: skip`); OSError when reading or writing fails.
    """
    names = None if recipe.classes is None else _read_class_list(Path(recipe.classes))
    classes, samples = SOURCES[recipe.source.kind](Path(recipe.source.path), names)
    key_digests([sample.key for sample in samples])
    sizes = [sample.path.stat().st_size for sample in samples]
    output, log = Path(recipe.output), _Log()
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output, sum(sizes))
    with atomic_path(manifest_path(output)) as partial_manifest, atomic_path(output) as partial:
        beton_bytes = write_beton(partial, _images(recipe, samples, log), len(samples), max(sizes))
        if not log.keys:
            raise DataError(
                f"{recipe.source.path}: expected at least one image that decodes, found none of {len(samples)}"
            )
        manifest = PackManifest(
            recipe=recipe,
            beton_bytes=beton_bytes,
            tables_crc32=tables_crc32(partial, len(log.keys)),
            classes=tuple(classes),
            keys=tuple(log.keys),
            crc32=tuple(log.crc32),
            sizes=tuple(log.sizes),
            converted=log.converted,
            skipped=tuple(log.skipped),
            libraries=library_versions(),
        )
        partial_manifest.write_text(manifest.model_dump_json(), encoding="utf-8")
        manifest_path(output).unlink(missing_ok=True)  # a crash between the two must not leave a pair that disagrees
    save_recipe(recipe, output.with_suffix(".recipe.yaml"))
    return manifest


def image_folder(root: Path, classes: list[str] | None) -> tuple[list[str], list[Sample]]:
    """torchvision's ImageFolder layout: root/class/**/image. Returns class names and samples in sorted key order."""
    if not root.is_dir():
        raise DataError(
            f"source.path: expected a folder of class folders, found nothing at {str(root)!r}; check the path"
        )
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(
            f"source.path: expected class folders in {str(root)!r}, found none; images belong in root/CLASS/"
        )
    names = folders if classes is None else classes
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise DataError(f"{root}: expected folders named in the class list, found {_few(unknown)}; add or remove them")
    index = {name: label for label, name in enumerate(names)}
    found = {name: list(_image_files(root / name)) for name in folders}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(
            f"{root}: expected images in every class folder, found none in {_few(empty)}; add or remove them"
        )
    samples = (
        Sample(path.relative_to(root).as_posix(), index[name], path) for name, files in found.items() for path in files
    )
    return names, sorted(samples, key=lambda sample: sample.key)


SOURCES: dict[str, Callable[[Path, list[str] | None], tuple[list[str], list[Sample]]]] = {"imagefolder": image_folder}


def encode(data: bytes, max_side: int | None) -> tuple[bytes, int, int, bool]:
    """(JPEG bytes, width, height, whether they were converted). Upright 8-bit grey or RGB JPEGs within `max_side` pass
    through unchanged; everything else becomes an RGB JPEG of quality 95 without chroma subsampling, as PIL sees it.

    Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            upright = image.getexif().get(ORIENTATION, 1) == 1
            fits = max_side is None or max(width, height) <= max_side
            plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")  # MPO: a JPEG with others behind it
            if upright and fits and plain and decodes(data, height, width):
                return data, width, height, False
            if image.mode[0] in "IF":
                raise ValueError(f"its samples have more than 8 bits (PIL's mode {image.mode})")
            rgb = ImageOps.exif_transpose(image).convert("RGB")
        if max_side is not None:
            rgb.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        rgb.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return stream.getvalue(), rgb.width, rgb.height, True
    except Exception as error:  # PIL raises nearly anything on broken files
        raise BadImage(str(error) or type(error).__name__) from None


def _images(recipe: PackRecipe, samples: list[Sample], log: _Log) -> Iterator[PackedImage]:
    def read(sample: Sample) -> tuple[Sample, tuple[bytes, int, int, bool] | BadImage]:
        try:
            return sample, encode(sample.path.read_bytes(), recipe.max_side)
        except BadImage as error:
            return sample, error

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        results = _in_order(pool, read, samples, 16 * threads)
        for sample, result in tqdm(results, f"pack {recipe.output}", len(samples), unit="img", mininterval=0.5):
            if isinstance(result, BadImage):
                if recipe.on_bad_image == "error":
                    raise DataError(
                        f"{sample.path}: expected an 8-bit image, found one that does not decode ({result}); "
                        "remove it, or set on_bad_image: skip"
                    )
                log.skipped.append(sample.key)
                continue
            jpeg, width, height, converted = result
            log.keys.append(sample.key)
            log.crc32.append(zlib.crc32(jpeg))
            log.sizes.append(len(jpeg))
            log.converted += converted
            yield PackedImage(jpeg, width, height, sample.label)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """pool.map with at most `ahead` results waiting, so that a large data set does not pile up in memory."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _image_files(folder: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(folder, followlinks=True):
        yield from (Path(directory, name) for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _read_class_list(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes: expected a readable file with one class name a line, found: {error}") from None
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        raise DataError(f"{path}: expected different class names, one a line, found {_few(twice) if twice else 'none'}")
    return names


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise DataError(f"{output}: expected {needed / 1e6:.0f} MB of free disk, found {free / 1e6:.0f} MB; make room")


def _few(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
