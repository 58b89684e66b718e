"""Split a folder of class folders into train/ and validation/ for configs/own/:

    python scripts/split_images.py photos data/own --validation 0.2 --seed 0

Files are copied. A digest of the seed and of the path in SOURCE decides which images of a class validate, so
the same call gives the same split on every machine. Every class has at least one image on both sides.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

from softshard.pipeline.images.sources.contract import IMAGE_SUFFIXES
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import atomic_path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with one folder of images for each class")
    parser.add_argument("target", type=Path, help="where train/ and validation/ are made")
    parser.add_argument("--validation", type=float, default=0.2, help="the fraction of each class that validates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        counts = split(options.source, options.target, options.validation, options.seed)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.target}: " + ", ".join(f"{count} images in {name}/" for name, count in counts.items()))
    return 0


def split(source: Path, target: Path, fraction: float, seed: int) -> dict[str, int]:
    """Copy the images of each class into train/ and validation/, and count them. Raises DataError."""
    folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    if not folders:
        raise DataError(f"{source}: expected class folders, found none; check the path")
    if not 0 < fraction < 1:
        raise DataError(f"--validation: expected a fraction between 0 and 1, found {fraction}; give another one")
    existing = [target / name for name in ("train", "validation") if (target / name).exists()]
    if existing:
        raise DataError(
            f"{existing[0]}: expected nothing there, found an earlier split; remove it or name another folder"
        )
    plan = [divided(source, folder, fraction, seed) for folder in folders]
    files = {name: [path for sides in plan for path in sides[name]] for name in ("train", "validation")}
    with atomic_path(target / "train") as train, atomic_path(target / "validation") as validation:
        for name, partial in (("train", train), ("validation", validation)):
            for path in files[name]:
                copy = partial / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
    return {name: len(paths) for name, paths in files.items()}


def divided(source: Path, folder: Path, fraction: float, seed: int) -> dict[str, list[Path]]:
    """The images of one class folder by the side that they are on."""
    images = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    if len(images) < 2:
        raise DataError(f"{folder}: expected at least two images of a class, found {len(images)}; add some")
    images.sort(key=lambda path: hashlib.blake2b(f"{seed}/{path.relative_to(source).as_posix()}".encode()).digest())
    count = min(max(1, round(len(images) * fraction)), len(images) - 1)
    return {"validation": images[:count], "train": images[count:]}


if __name__ == "__main__":
    sys.exit(main())
