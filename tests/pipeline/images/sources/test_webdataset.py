"""WebDataset tars: which samples they hold, and what is wrong with them."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.small_sources import JPEG, pack_from, sample, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from softshard.pipeline.images.sources import open_source
from softshard.pipeline.images.sources.contract import Source
from softshard.pipeline.images.sources.webdataset import split_member_name
from softshard.pipeline.recipes.recipe import SourceRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError


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


@given(st.text("a./J g", max_size=9))
@settings(max_examples=500, deadline=None)
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    sample, suffix = split_member_name(name)
    assert sample + suffix == name
    if not suffix:
        assert base_plus_ext(name) == (None, None)
    elif sample and not sample.endswith("/"):  # not hidden
        assert base_plus_ext(name) == (sample, suffix.removeprefix("."))


def test_hidden_files_and_folders_of_several_lines_are_no_samples(tmp_path: Path) -> None:
    samples = [f"{name}.{suffix}" for name in ("a\nb/one", "b/", "", "two", "c/th\nree") for suffix in ("jpg", "cls")]
    source = open_tar(write_tar(tmp_path / "f.tar", [(name, b"0") for name in samples], format=tarfile.PAX_FORMAT))
    assert source.keys == ["two.jpg", "c/th\nree.jpg"]


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
