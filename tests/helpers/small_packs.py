"""Small packed files for tests, ways to look into them, and ways to spoil them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from softshard.pipeline.images.beton import Beton, manifest_path, open_beton, tables_crc32
from softshard.pipeline.images.manifest import PackManifest, document_digest
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe

BAD = {
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"this is not an image\n" * 40,
    "empty": lambda data: b"",
}


def recipe_for(path: Path | str, output: Path, kind: Any = "imagefolder", **changes) -> PackRecipe:
    return PackRecipe(source=SourceRecipe(kind=kind, path=str(path)), output=str(output), **changes)


def pack_folder(root: Path, **changes) -> tuple[PackManifest, Beton]:
    """The manifest that `pack` returned and the file it made."""
    output = root.with_suffix(".beton")
    return pack(recipe_for(root, output, **changes)), open_beton(output)


def jpeg(beton: Beton, row: int) -> bytes:
    start = int(beton.offsets[row])
    return beton.path.read_bytes()[start : start + int(beton.lengths[row])]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def spoil(root: Path, key: str, bad: Callable[[bytes], bytes] = BAD["truncated"]) -> None:
    (root / key).write_bytes(bad((root / key).read_bytes()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def edit_manifest(path: Path, **changes) -> None:
    """Change keys of the manifest beside a .beton, and make it fit the tables that are in the file now."""
    fields = json.loads(manifest_path(path).read_text())
    fields["tables_crc32"] = tables_crc32(path, len(fields["keys"]))
    content = {name: value for name, value in (fields | changes).items() if name != "digest"}
    manifest_path(path).write_text(json.dumps(content | {"digest": document_digest(content)}))
