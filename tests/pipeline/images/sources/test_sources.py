"""Sources: what class folders, tars and parquet files hold, and what is wrong with them."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_packs import contents, encoded, pack_folder
from helpers.small_sources import JPEG, pack_from, rows_of, sample, table, write_parquet, write_tar
from PIL import Image

from softshard.pipeline.__main__ import main
from softshard.pipeline.images import manifest as manifest_module
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import key_digests
from softshard.pipeline.images.sources import open_source
from softshard.pipeline.recipes.recipe import SourceRecipe
from softshard.pipeline.runtime.errors import DataError

# Folders, classes and keys


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source\.path: expected a folder of class folders, found nothing at '.*none'"):
        pack_folder(tmp_path / "none")


def test_images_outside_class_folders(tmp_path: Path, photographs: list[Image.Image]) -> None:
    (tmp_path / "images").mkdir()
    for _ in range(2):  # an empty folder, then one with an image in the wrong place
        with pytest.raises(DataError, match=r"expected class folders in .*, found none; images belong in root/CLASS/"):
            pack_folder(tmp_path / "images")
        photographs[0].save(tmp_path / "images" / "0.jpg")


def test_empty_class_folder(root: Path) -> None:
    (root / "c" / "deeper").mkdir(parents=True)
    (root / "c" / "readme.md").write_text("nothing here")
    with pytest.raises(DataError, match="expected images in every class folder, found none in 'c'; add or remove them"):
        pack_folder(root)


def test_class_list_gives_the_order(root: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("b\n\nwithout images\n a \n", encoding="utf-8")
    manifest, beton = pack_folder(root, classes=str(tmp_path / "names"))
    assert manifest.classes == ("b", "without images", "a")
    assert manifest.keys == ("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
    assert beton.labels.tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"b\nc\n", r"images: expected folders named in the class list, found 'a'; add or remove them"),
        (b"a\nb\na\nc\nc\n", r"names: expected different class names, one a line, found 'a', 'c'"),
        (b"\n \n", r"names: expected different class names, one a line, found none"),
        (b"\xff\xfe", r"classes: expected a readable file with one class name a line, found: .*decode"),
        (None, r"classes: expected a readable file with one class name a line, found: .*No such file"),
    ],
)
def test_wrong_class_lists(names: bytes | None, message: str, root: Path, tmp_path: Path) -> None:
    if names is not None:
        (tmp_path / "names").write_bytes(names)
    with pytest.raises(DataError, match=message):
        pack_folder(root, classes=str(tmp_path / "names"))


def test_one_key_twice() -> None:
    assert key_digests(["a/1", "a/2"]).dtype == np.uint64
    with pytest.raises(DataError, match=r"found the key 'a/1' twice \(1 such pairs\); rename or remove"):
        key_digests(["a/1", "b/1", "a/1"])


def test_colliding_digests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "key_digest", lambda key: zlib.crc32(key.encode()) % 2)
    with pytest.raises(DataError, match=r"found the keys '.*' and '.*' with one digest \(2 such pairs\)"):
        pack_folder(root)
    assert contents(root.parent) == {}


def test_a_file_name_that_is_not_utf8(root: Path) -> None:
    (root / "a" / "0.jpg").rename(root / "a" / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(DataError, match=r"expected file names in UTF-8, found 'a/caf\\udce9\.jpg'; rename it"):
        pack_folder(root)


# Parity: the same images as folders, tars and parquet files


def test_tars_hold_the_same_samples_as_folders(photos: Beton, shards: Path, tmp_path: Path) -> None:
    beton = pack_from("webdataset", shards, tmp_path / "f.beton")
    assert rows_of(beton) == rows_of(photos)
    assert beton.manifest.classes == ("0", "1")
    (tmp_path / "names").write_text("flower\ntemple\nnever seen\n")
    beton = pack_from("webdataset", shards, tmp_path / "f.beton", classes=str(tmp_path / "names"))
    assert beton.manifest.classes == ("flower", "temple", "never seen")
    assert set(beton.keys) == set(photos.keys)


def test_parquet_holds_the_same_samples_as_folders(photos: Beton, tables: Path, tmp_path: Path) -> None:
    beton = pack_from("parquet", tables, tmp_path / "f.beton")
    assert rows_of(beton) == rows_of(photos)
    assert beton.manifest.classes == photos.manifest.classes
    assert beton.manifest.keys == photos.manifest.keys, "in the order of files and rows"


@pytest.mark.parametrize(
    ("pattern", "tars"),
    [
        ("", [0, 1, 2]),
        ("set-0001.tar", [1]),
        ("set-*.tar", [0, 1, 2]),
        ("set-{0002..0001}.tar", [2, 1]),
        ("set-000{2,0,2}.tar", [2, 0]),
        ("{set-0001,set-*}.tar", [1, 0, 2]),
    ],
)
def test_patterns(pattern: str, tars: list[int], shards: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_tar(shards / f"set-{number:04}.tar", sample(f"{number}.jpg", b"", 0))
    source = open_source(SourceRecipe(kind="webdataset", path=str(shards / pattern)), None)
    assert source.keys == [f"{number}.jpg" for number in tars]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none/{0..9}.x", "found none at '.*none/0.x', '.*none/1.x', '.*none/2.x' and 7 more; check the path"),
        ("none*", r"found none at '.*none\*'; check the path"),
        ("", "found none at '.*'; check the path"),
        ("{0..9.x", r"source\.path: expected balanced braces, found '.*\{0..9.x'"),
    ],
)
def test_patterns_without_files(kind: Any, pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(SourceRecipe(kind=kind, path=str(tmp_path / pattern)), None)


# The command line


def call_pack(tmp_path: Path, *options: str) -> int:
    (tmp_path / "pack.yaml").write_text(f"source: {{kind: imagefolder, path: none}}\noutput: {tmp_path}/f.beton\n")
    return main(["pack", "--config", str(tmp_path / "pack.yaml"), *options])


def test_pack_ends_with_its_counts(shards: Path, tmp_path: Path, photographs: list[Image.Image], capsys) -> None:
    crop = photographs[0].crop((200, 100, 301, 177))
    odd = sample("1.png", encoded(crop, "PNG"), 1) + sample("2.jpg", encoded(crop.convert("CMYK"), "JPEG"), 1)
    write_tar(shards / "odd.tar", odd + sample("bad.jpg", JPEG, 0))
    options = "--source.kind", "webdataset", "--source.path", str(shards)
    assert call_pack(tmp_path, *options, "--on_bad_image", "skip") == 0
    size = (tmp_path / "f.beton").stat().st_size / 1e6
    assert capsys.readouterr().out == (
        f"{tmp_path}/f.beton: 24 images in 2 classes, {size:.1f} MB; converted: 1 cmyk, 1 png; skipped: 1\n"
    )


def test_pack_with_other_columns(tmp_path: Path, photographs: list[Image.Image], capsys) -> None:
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG")
    write_parquet(tmp_path / "f.parquet", table({"a.jpg": (data, 1)}).rename_columns(["img", "label"]))
    options = "--source.kind", "parquet", "--source.path", str(tmp_path / "f.parquet")
    assert call_pack(tmp_path, *options) == 2
    assert "set source.columns" in capsys.readouterr().err
    assert call_pack(tmp_path, *options, "--source.columns.image", "img") == 0
    assert "1 images in 2 classes, " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_damaged_source_leaves_one_message_and_no_file(kind: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "damaged").write_bytes(b"neither a tar nor a parquet file" * 100)
    options = "--source.kind", kind, "--source.path", str(tmp_path / "damaged")
    assert call_pack(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "damaged: expected a whole " in error
    assert "Traceback" not in error
    assert sorted(contents(tmp_path)) == ["damaged", "pack.yaml"]


def test_an_unknown_kind(tmp_path: Path, capsys) -> None:
    assert call_pack(tmp_path, "--source.kind", "lmdb") == 2
    assert "--source.kind: input should be 'imagefolder', 'webdataset' or 'parquet' (got \"lmdb\")" in (
        capsys.readouterr().err
    )
