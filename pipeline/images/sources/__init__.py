"""Where images come from: class folders, WebDataset tars, parquet files of the Hugging Face hub."""

import glob
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from softshard.pipeline.images.sources.contract import Source, quoted
from softshard.pipeline.images.sources.imagefolder import image_folder
from softshard.pipeline.images.sources.webdataset import webdataset
from softshard.pipeline.recipes.recipe import ColumnsRecipe, SourceRecipe
from softshard.pipeline.runtime.errors import DataError


def open_source(recipe: SourceRecipe, class_list: Path | None) -> Source:
    """List a source.

    Args:
        recipe: its kind and where it is.
        class_list: a file with the name of a class in each line, or None for the source's own classes.

    Raises:
        DataError: for what is missing or does not fit together.
        FormatError: for damaged files.
    """
    names = None if class_list is None else _read_class_list(class_list)
    if recipe.kind == "imagefolder":
        return image_folder(Path(recipe.path), names)
    if recipe.kind == "webdataset":
        return webdataset(_files(recipe.path, ".tar"), names)
    from softshard.pipeline.images.sources.parquet import parquet  # here: pyarrow is large, and nothing else needs it

    return parquet(_files(recipe.path, ".parquet"), names, recipe.columns or ColumnsRecipe())


def _files(pattern: str, suffix: str) -> list[Path]:
    """A file, all files of a kind in a folder, or those of a pattern; a pattern's braces must all be there."""
    path = Path(pattern)
    if path.is_dir():
        found = {pattern: sorted(path.rglob(f"*{suffix}"))}
    elif path.exists():
        found = {pattern: [path]}
    else:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"source.path: expected balanced braces, found {pattern!r} ({error}); correct it") from None
        found = {name: [Path(file) for file in sorted(glob.glob(name, recursive=True))] for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise DataError(f"source.path: expected {suffix} files, found none at {quoted(missing)}; check the path")
    return list(dict.fromkeys(file for files in found.values() for file in files))


def _read_class_list(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes: expected a readable file with one class name a line, found: {error}") from None
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        raise DataError(
            f"{path}: expected different class names, one a line, found {quoted(twice) if twice else 'none'}"
        )
    return names
