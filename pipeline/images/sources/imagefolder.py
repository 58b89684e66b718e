"""Class folders, as torchvision's ImageFolder takes them."""

import os
from collections.abc import Iterator
from pathlib import Path

from softshard.pipeline.images.sources.contract import IMAGE_SUFFIXES, Sample, Source, class_numbers, quoted
from softshard.pipeline.runtime.errors import DataError


def image_folder(root: Path, names: list[str] | None) -> Source:
    """List images in the layout of torchvision's ImageFolder: root/class/**/image, in sorted order of keys.

    Args:
        root: the folder of class folders.
        names: the class list, or None for the names of the folders.

    Raises:
        DataError: when there are no class folders, one is empty, or the class list lacks one.
    """
    if not root.is_dir():
        raise DataError(
            f"source.path: expected a folder of class folders, found nothing at {str(root)!r}; check the path"
        )
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not folders:
        raise DataError(
            f"source.path: expected class folders in {str(root)!r}, found none; images belong in root/CLASS/"
        )
    classes = folders if names is None else names
    numbers = class_numbers(folders, classes, f"{root}: expected folders named in the class list")
    found = {name: list(_image_files(root / name)) for name in folders}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(
            f"{root}: expected images in every class folder, found none in {quoted(empty)}; add or remove them"
        )
    labels = dict(zip(folders, numbers, strict=True))
    rows = sorted((path.relative_to(root).as_posix(), labels[name], path) for name in found for path in found[name])
    sizes = [path.stat().st_size for _, _, path in rows]
    samples = (Sample(key, label, str(path), path.read_bytes) for key, label, path in rows)
    return Source(classes, [key for key, _, _ in rows], sum(sizes), max(sizes), samples)


def _image_files(folder: Path) -> Iterator[Path]:
    for directory, _, files in os.walk(folder, followlinks=True):
        yield from (Path(directory, name) for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
