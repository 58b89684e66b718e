"""Sources: what class folders, tars and parquet files hold, and what is wrong with them."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from small_packs import contents, encoded, jpeg, pack_folder

from pipeline import manifest as manifest_module
from pipeline.__main__ import main
from pipeline.beton import Beton, open_beton
from pipeline.errors import DataError, FormatError
from pipeline.manifest import key_digests
from pipeline.pack import pack
from pipeline.recipe import ColumnsRecipe, PackRecipe, SourceRecipe
from pipeline.sources import Source, open_source

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


@pytest.fixture
def shards(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in three tars."""
    images = list(images_of(photo_folder).items())
    for number in range(3):
        members = [part for key, (data, label) in images[number::3] for part in sample(key, data, label)]
        write_tar(tmp_path / "tars" / f"set-{number:04}.tar", members)
    return tmp_path / "tars"


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


@pytest.fixture
def tables(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in two parquet files with several row groups each."""
    images = list(images_of(photo_folder).items())
    (tmp_path / "tables").mkdir()
    for number in range(2):
        part = dict(images[number * 11 : (number + 1) * 11])
        pq.write_table(table(part), tmp_path / "tables" / f"train-0000{number}-of-00002.parquet", row_group_size=3)
    return tmp_path / "tables"


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


# Tars

JPEG = b"\xff\xd8 not looked at here"


def open_tar(path: Path, names: Path | None = None) -> Source:
    return open_source(SourceRecipe(kind="webdataset", path=str(path)), names)


def test_webdataset_groups_members_as_its_library_does(tmp_path: Path) -> None:
    """Up to the first dot of the base name, whatever the folder; suffixes in any case; others are passed over."""
    members = [
        ("./a.b/one.JPEG", JPEG),
        ("./a.b/one.cls", b" 3\n"),
        ("two.cls", b"0"),
        ("._two.jpg", b"a file of macOS"),
        ("two.seg.png", b"a mask"),
        ("two.png", b"\x89PNG"),
        ("no suffix", b""),
    ]
    source = open_tar(write_tar(tmp_path / "f.tar", members))
    found = [(item.key, item.label, item.read()) for item in source.samples]
    assert found == [("a.b/one.JPEG", 3, JPEG), ("two.png", 0, b"\x89PNG")]
    assert source.classes == ["0", "1", "2", "3"]
    assert (source.total, source.largest) == (len(JPEG) + 4, len(JPEG))


@given(
    images=st.lists(
        st.tuples(st.binary(max_size=1500), st.integers(0, 999), st.sampled_from(["jpg", "JPEG", "png", "webp"])),
        min_size=1,
        max_size=8,
    ),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    folder=st.sampled_from(["", "folder/", "a" * 120 + "/", "ümläut/"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tar_format_gives_bytes_back(images: list, layout: int, folder: str, tmp_path: Path) -> None:
    members = []
    for number, (data, label, suffix) in enumerate(images):
        members += sample(f"{folder}{number}.{suffix}", data, label)
    if layout == tarfile.USTAR_FORMAT and not folder.isascii():
        folder = "folder/"
    source = open_tar(write_tar(tmp_path / "f.tar", members, format=layout))
    assert [(item.label, item.read()) for item in source.samples] == [(label, data) for data, label, _ in images]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", JPEG)], "a: expected one image and one .cls, found 1 and 0; "),
        ([("a.cls", b"0")], "a: expected one image and one .cls, found 0 and 1; "),
        ([("a.json", b"{}")], "a: expected one image and one .cls, found 0 and 0; "),
        ([("a.jpg", JPEG), ("a.png", JPEG), ("a.cls", b"0")], "a: expected one image and one .cls, found 2 and 1; "),
        ([("a.jpg", JPEG), ("a.cls", b"0"), ("a.cls", b"0")], "a: expected one image and one .cls, found 1 and 2; "),
        ([("a.jpg", JPEG), ("a.cls", b"cat")], "a.cls: expected a class number from 0 on, found b'cat'; "),
        ([("a.jpg", JPEG), ("a.cls", b"-1")], "a.cls: expected a class number from 0 on, found b'-1'; "),
        ([("a.jpg", JPEG), ("a.cls", b"1.0")], "a.cls: expected a class number from 0 on, found b'1.0'; "),
        ([("a.jpg", JPEG), ("a.cls", b"")], "a.cls: expected a class number from 0 on, found b''; "),
        ([("a.jpg", JPEG), ("a.cls", b" " * 99)], "a.cls: expected a class number from 0 on, found b' +'; "),
        ([("a.jpg", JPEG), ("a.cls", b"1048576")], "a.jpg: expected a class number from 0 to 1048575, found 1048576 "),
        ([], "expected samples .*, found none"),
    ],
)
def test_tars_that_are_no_samples(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"f\.tar: {message}"):
        open_tar(write_tar(tmp_path / "f.tar", members))


def test_a_class_number_outside_the_class_list(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\n")
    write_tar(tmp_path / "f.tar", sample("a.jpg", JPEG, 2))
    with pytest.raises(DataError, match=r"f\.tar: a\.jpg: expected a class number from 0 to 1, found 2"):
        open_tar(tmp_path / "f.tar", tmp_path / "names")


def test_one_key_in_two_shards(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / "tars" / f"{name}.tar", sample("0.jpg", JPEG, 0))
    message = r"b\.tar: expected keys that no other shard has, found '0\.jpg' in .*a\.tar too; write"
    with pytest.raises(DataError, match=message):
        open_tar(tmp_path / "tars")


@pytest.mark.parametrize(
    ("compress", "kind"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")],
)
def test_compressed_tars(compress: Callable[[bytes], bytes], kind: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "f.tar", sample("a.jpg", JPEG, 0))
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(FormatError, match=f"expected a tar without compression, found {kind}; decompress it first"):
        open_tar(path)


def test_truncated_tars(tmp_path: Path) -> None:
    """At every block, and within blocks."""
    path = write_tar(tmp_path / "f.tar", sample("a.jpg", JPEG * 50, 0) + sample("b.jpg", JPEG, 1))
    data = path.read_bytes()
    last = len(data.rstrip(b"\0"))
    end = -(-last // 512) * 512
    for length in [*range(0, end + 1, 512), *range(100, end + 512, 512)]:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"f\.tar: expected a whole tar, found"):
            open_tar(path)
    path.write_bytes(data[: end + 512])
    assert open_tar(path).keys == ["a.jpg", "b.jpg"], "with its end it is whole, however little padding follows"


def test_damaged_headers_and_joined_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "f.tar", sample("a.jpg", JPEG, 0) + sample("b.jpg", JPEG, 1))
    data = path.read_bytes()
    for damaged in (data[:1024] + b"\1" + data[1025:], data + data, data[:2048] + b"x" * 512 + data[2560:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"f\.tar: expected a whole tar, found something that is no member at"):
            open_tar(path)
    path.write_bytes(b"no tar at all" * 1000)
    with pytest.raises(FormatError, match=r"f\.tar: expected a whole tar, found: "):
        open_tar(path)


def test_links_and_folders_in_tars_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "f.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in sample("a.jpg", JPEG, 0):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert open_tar(path).keys == ["a.jpg"]


def test_a_bad_image_in_a_tar_is_named(shards: Path, tmp_path: Path) -> None:
    write_tar(shards / "bad.tar", sample("n01/n01_18.JPEG", JPEG, 0))
    with pytest.raises(DataError, match=r"bad\.tar: n01/n01_18\.JPEG: expected an image, found one that does not dec"):
        pack_from("webdataset", shards / "bad.tar", tmp_path / "f.beton")
    beton = pack_from("webdataset", shards, tmp_path / "f.beton", on_bad_image="skip")
    assert beton.manifest.skipped == ("n01/n01_18.JPEG",)


# Parquet

IMAGES = {f"{number}.jpg": (b"%d" % number, number % 2) for number in range(5)}


def write_parquet(path: Path, made: pa.Table, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(made, path, **options)
    return path


def open_parquet(path: Path | str, names: Path | None = None, **columns: str) -> Source:
    recipe = ColumnsRecipe(**columns) if columns else None
    return open_source(SourceRecipe(kind="parquet", path=str(path), columns=recipe), names)


def structs(values: list, path_type: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", path_type or pa.string())]))


@given(
    images=st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 1)), min_size=1, max_size=300),
    group=st.integers(1, 200),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    plain=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_parquet_layout_gives_bytes_back(
    images: list, group: int, compression: str, plain: bool, tmp_path: Path
) -> None:
    made = table({f"{number}.jpg": image for number, image in enumerate(images)})
    if plain:
        made = made.set_column(0, "image", pa.array([data for data, _ in images], pa.large_binary()))
    path = write_parquet(tmp_path / "f.parquet", made, row_group_size=group, compression=compression)
    source = open_parquet(path)
    assert [(item.read(), item.label) for item in source.samples] == images
    form = "f.parquet/{}" if plain else "{}.jpg"
    assert source.keys == [form.format(number) for number in range(len(images))]
    assert source.largest >= max(len(data) for data, _ in images)


def test_memory_holds_a_row_group_not_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10_000_000)
    images = {str(start): (data[start : start + 10_000], 0) for start in range(0, len(data), 10_000)}
    path = write_parquet(tmp_path / "f.parquet", table(images), row_group_size=50)
    before = pa.total_allocated_bytes()
    used = [len(item.read()) + pa.total_allocated_bytes() - before for item in open_parquet(path).samples]
    assert len(used) == 1000
    assert max(used) < 5_000_000


@pytest.mark.parametrize("paths", [["a", "b", "a"], ["a", "b", None], ["a", "b", ""], [None] * 3])
def test_rows_without_a_path_of_their_own_have_a_number(paths: list[str | None], tmp_path: Path) -> None:
    """For the whole data set: the same image must not change its key with its neighbours'."""
    image = structs([{"bytes": b"x", "path": path} for path in paths])
    for name in ("a/x.parquet", "b/x.parquet"):
        (tmp_path / "set").mkdir(exist_ok=True)
        made = pa.table({"image": image, "label": [0, 1, 2]})
        write_parquet(tmp_path / "set" / name, made)
    keys = open_parquet(tmp_path / "set").keys
    assert keys == [f"{name}/x.parquet/{row}" for name in "ab" for row in range(3)]
    assert open_parquet(tmp_path / "set" / "a").keys == [f"x.parquet/{row}" for row in range(3)]


def test_other_column_names(tmp_path: Path) -> None:
    made = table(IMAGES).rename_columns(["img", "fine_label"])
    path = write_parquet(tmp_path / "f.parquet", made)
    source = open_parquet(path, image="img", label="fine_label")
    assert [item.read() for item in source.samples] == [data for data, _ in IMAGES.values()]
    with pytest.raises(
        DataError,
        match=r"f\.parquet: expected the columns 'image' and 'label', found \['img', 'fine_label'\]; set source",
    ):
        open_parquet(path)


def test_a_class_list_gives_the_metadata_other_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES))
    (tmp_path / "names").write_text("temple\nboat\nflower\n")
    source = open_parquet(path, tmp_path / "names")
    assert source.classes == ["temple", "boat", "flower"]
    assert [item.label for item in source.samples] == [2, 0, 2, 0, 2]
    (tmp_path / "names").write_text("temple\nn01440764\n")
    with pytest.raises(DataError, match=r"f\.parquet: expected classes of the class list, found 'flower'; add"):
        open_parquet(path, tmp_path / "names")


def test_parquet_without_metadata_has_numbers(tmp_path: Path) -> None:
    made = table(IMAGES).replace_schema_metadata(None)
    path = write_parquet(tmp_path / "f.parquet", made.set_column(1, "label", pa.array([0, 1, 2, 3, 1], pa.uint8())))
    assert open_parquet(path).classes == ["0", "1", "2", "3"]
    (tmp_path / "names").write_text("a\nb\nc\nd\ne\n")
    source = open_parquet(path, tmp_path / "names")
    assert (source.classes, [item.label for item in source.samples]) == (["a", "b", "c", "d", "e"], [0, 1, 2, 3, 1])
    (tmp_path / "names").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"f\.parquet: row 2: expected a class number from 0 to 1, found 2 "):
        open_parquet(path, tmp_path / "names")


LABELS = pa.array([0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": pa.array([0, 1, -1, 0, 1])},
            r"row 2: expected a class number from 0 to 1, found -1 \(an",
        ),
        ({"label": pa.array([0, 1, 0, 0, 2])}, "row 4: expected a class number from 0 to 1, found 2"),
        ({"label": pa.array([0, 1, 0, None, 0])}, "row 3: expected a class number, found null; leave the file out"),
        ({"label": pa.array(["a"] * 5)}, "label: expected integers, found string; set source.columns"),
        ({"image": pa.array(["a"] * 5)}, "image: expected images as {bytes, path} or binary, found string; set source"),
        ({"image": pa.array([{"path": "a"}] * 5)}, "image: expected images as {bytes, path} or binary, found struct<"),
    ],
)
def test_wrong_columns(changes: dict, message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES, **changes))
    with pytest.raises(DataError, match=rf"f\.parquet: {message}"):
        open_parquet(path)


@pytest.mark.parametrize("missing", [None, {"bytes": None, "path": "4.jpg"}])
def test_a_row_without_an_image(missing: dict | None, tmp_path: Path) -> None:
    rows = [{"bytes": data, "path": key} for key, (data, _) in IMAGES.items()]
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES, image=structs([*rows[:4], missing])), row_group_size=2)
    with pytest.raises(DataError, match=r"f\.parquet: row 4: expected the bytes of an image, found null; write"):
        list(open_parquet(path).samples)


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", table(IMAGES).slice(0, 0))
    with pytest.raises(DataError, match=r"f\.parquet: expected rows, found none"):
        open_parquet(tmp_path / "f.parquet")


def test_files_of_different_data_sets(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "a.parquet", table(IMAGES))
    write_parquet(tmp_path / "set" / "b.parquet", table(IMAGES).replace_schema_metadata(None))
    with pytest.raises(DataError, match=r"b\.parquet: expected the class names of .*a\.parquet, found others; pack"):
        open_parquet(tmp_path / "set")


@pytest.mark.parametrize("metadata", ["[", "[]", '{"info": {"features": {"label": {"names": 3}}}}'])
def test_metadata_that_makes_no_sense(metadata: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", table(IMAGES).replace_schema_metadata({"huggingface": metadata}))
    with pytest.raises(FormatError, match=r"f\.parquet: expected the metadata that Hugging Face datasets writes"):
        open_parquet(tmp_path / "f.parquet")


def test_damaged_parquet(tables: Path, tmp_path: Path) -> None:
    path = next(iter(sorted(tables.iterdir())))
    data = path.read_bytes()
    for damaged in (b"", b"no parquet" * 100, data[: len(data) // 2], data[:-8] + b"\xff" * 8):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"\.parquet: expected a whole parquet file, found: .*; copy or download"):
            open_parquet(path)
    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])  # pages of the first image column, not the tables
    with pytest.raises(FormatError, match=r"\.parquet: expected a whole parquet file, found: .*; copy or download"):
        list(open_parquet(path).samples)


def test_checksums_of_parquet_pages_are_checked(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "f.parquet", table({"a": (b"x" * 1000, 0)}), write_page_checksum=True, compression="none"
    )
    assert [item.read() for item in open_parquet(path).samples] == [b"x" * 1000]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"xxx", b"xyx", 1))
    with pytest.raises(FormatError, match=r"f\.parquet: expected a whole parquet file, found: "):
        list(open_parquet(path).samples)


def test_columns_belong_to_parquet() -> None:
    with pytest.raises(ValidationError, match=r"columns belongs to kind: parquet \(got kind: webdataset\)"):
        SourceRecipe(kind="webdataset", path="x", columns=ColumnsRecipe())


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
