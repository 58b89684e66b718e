"""Small tars and parquet files for tests, and what is packed from them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.small_packs import jpeg

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import ColumnsRecipe, PackRecipe, SourceRecipe

JPEG = b"\xff\xd8 not looked at here"


def images_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and class number of each image of class folders, by key."""
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), classes.index(path.parent.name)) for path in files}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(name: str, data: bytes, label: int) -> list[tuple[str, bytes]]:
    """The members of a sample as timm's ImageNet shards have them, and members that must not be opened."""
    key = name.rpartition(".")[0]
    return [(name, data), (f"{key}.cls", b"%d" % label), (f"{key}.json", b"{}"), (f"{key}.pyd", b"cos\nsystem\n")]


def rows_of(beton: Beton) -> dict[str, tuple[bytes, int]]:
    return {key: (jpeg(beton, row), int(beton.labels[row])) for row, key in enumerate(beton.manifest.keys)}


def pack_from(kind: str, path: Path | str, output: Path, columns: ColumnsRecipe | None = None, **changes) -> Beton:
    source = SourceRecipe(kind=kind, path=str(path), columns=columns)  # pyright: ignore[reportArgumentType]
    pack(PackRecipe(source=source, output=str(output), **changes))
    return open_beton(output)


def table(images: dict[str, tuple[bytes, int]], **changes) -> pa.Table:
    """Images as Hugging Face datasets writes them, with class names in the metadata."""
    feature = {"names": ["flower", "temple"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": feature}
    columns = {
        "image": pa.array(
            [{"bytes": data, "path": key} for key, (data, _) in images.items()],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "label": pa.array([label for _, label in images.values()], pa.int64()),
    }
    made = pa.table(columns | changes)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, made: pa.Table, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(made, path, **options)
    return path
