"""Sources: what class folders, tars and parquet files hold, and what is wrong with them."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_packs import contents, pack_folder

from pipeline import manifest as manifest_module
from pipeline.errors import DataError
from pipeline.manifest import key_digests

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
