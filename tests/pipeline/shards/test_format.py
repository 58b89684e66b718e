"""Labels of one sample, and tars of them: what is written is read back, and nothing damaged or crafted passes."""

import hashlib
import json
import resource
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.small_sources import write_tar
from helpers.small_stores import SETTINGS, assert_equal, make_codes, make_manifest, make_template
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from softshard.pipeline.images.manifest import StoreManifest, key_digest
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.shards.format import (
    SampleLabels,
    ShardManifest,
    ShardRecord,
    decode_sample,
    encode_sample,
    is_shards,
    open_shards,
    read_shard,
    write_manifest,
    write_shard,
)
from softshard.pipeline.store.topk import Codes


def make_labels(manifest: StoreManifest, row: int = 0, key: int = 0xFEDCBA9876543210) -> SampleLabels:
    views = [make_codes(manifest, view) for view in range(manifest.views.count)]
    index, gap, tail = (np.stack([getattr(v, name)[row] for v in views]) for name in ("index", "gap", "tail"))
    template = make_template(manifest)[row] if manifest.template else None
    return SampleLabels(key, 2**32 - 1 - row, Codes(index, gap, tail), template)


def assert_same(found: SampleLabels, expected: SampleLabels) -> None:
    assert found[:2] == expected[:2]
    assert_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.template, expected.template)
    assert (found.template is None) == (expected.template is None)


def frame(content: bytes, level: int = 9, checksum: bool = True) -> bytes:
    return Zstd(level=level, checksum=checksum).encode(content)


def content_of(data: bytes) -> bytes:
    return bytes(Zstd().decode(data))  # pyright: ignore[reportCallIssue]


# One sample


@given(
    classes=st.sampled_from([5, 65534, 65535, 70000]),
    k=st.integers(1, 5),
    views=st.integers(1, 5),
    template=st.sampled_from([None, 1]),
    row=st.integers(0, 9),
)
@SETTINGS
def test_what_is_encoded_is_decoded(classes: int, k: int, views: int, template: int | None, row: int) -> None:
    manifest = make_manifest(classes=classes, k=k, views=views, template=template)
    labels = make_labels(manifest, row)
    data = encode_sample(labels)
    found = decode_sample(data, manifest)
    assert_same(found, labels)
    assert found.codes.index.shape == (views, k)
    [tensor.mul_(0) for tensor in found.codes.tensors()]  # memory of its own, which torch may write to
    assert encode_sample(labels) == data


def test_the_layout_is_that_of_the_format_page() -> None:
    codes = Codes(np.array([[1, 2], [3, 4]], np.uint16), np.array([[5], [6]], np.uint8), np.array([7, 8], np.uint8))
    data = encode_sample(SampleLabels(0x0102030405060708, 0x0A0B0C0D, codes, np.arange(5, dtype=np.uint8)))
    assert content_of(data).hex() == "08070605040302010d0c0b0a0100020003000400050607080001020304"


def test_labels_larger_than_the_window_of_zstd() -> None:
    manifest = make_manifest(classes=3_000_000, k=1, views=1, samples=2, template=1)
    data = encode_sample(make_labels(manifest))
    assert_same(decode_sample(data, manifest), make_labels(manifest))


@pytest.mark.parametrize("template", [None, 1])
def test_every_flipped_bit_is_noticed(template: int | None) -> None:
    manifest = make_manifest(template=template)
    data = encode_sample(make_labels(manifest))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match=r"^soft label: expected "):
            decode_sample(bytes(damaged), manifest)


def test_every_truncation_and_extension_is_noticed() -> None:
    manifest = make_manifest()
    data = encode_sample(make_labels(manifest))
    for damaged in [*(data[:length] for length in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(FormatError, match=r"^soft label: expected "):
            decode_sample(damaged, manifest)


def test_random_bytes_are_no_labels() -> None:
    rng, manifest = np.random.default_rng(0), make_manifest()
    start = encode_sample(make_labels(manifest))[:6]
    for number in range(300):
        data = rng.bytes(number)
        for damaged in (data, start + data):
            with pytest.raises(FormatError, match=r"^soft label: expected "):
                decode_sample(damaged, manifest)


def test_other_sizes_are_refused() -> None:
    content = content_of(encode_sample(make_labels(make_manifest())))
    for wrong in (content[:-1], content + b"\0", b""):
        with pytest.raises(FormatError, match=rf"zstd frame of {len(content)} bytes with a checksum, found one of"):
            decode_sample(frame(wrong), make_manifest())
    with pytest.raises(FormatError, match="or take the manifest that came with it"):
        decode_sample(frame(content), make_manifest(k=2))
    with pytest.raises(FormatError, match="with a checksum, found something else"):
        decode_sample(frame(content, checksum=False), make_manifest())
    assert_same(decode_sample(frame(content, level=1), make_manifest()), make_labels(make_manifest()))


def test_an_index_that_is_no_class_is_refused() -> None:
    labels = make_labels(make_manifest())
    labels.codes.index[1, 2] = 7
    with pytest.raises(FormatError, match="expected classes below 7, found 7"):
        decode_sample(encode_sample(labels), make_manifest())


def test_a_frame_cannot_make_it_allocate() -> None:
    manifest = make_manifest()
    data = encode_sample(make_labels(manifest))
    huge = data[:4] + bytes([0xE4]) + (2**40).to_bytes(8, "little") + data[7:]
    bomb, unsized = frame(bytes(1 << 28)), b"\x28\xb5\x2f\xfd\x00\x58" + b"\xfb\xff\xff\0" * 4096  # runs of 2 MB
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for crafted in (huge, bomb, unsized, data + huge, data + bomb, data + unsized):
        with pytest.raises(FormatError, match=r"^soft label: expected"):
            decode_sample(crafted, manifest)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB
    tracemalloc.stop()


def test_a_frame_that_holds_more_than_it_says_is_refused() -> None:
    manifest = make_manifest(views=8)
    content = content_of(encode_sample(make_labels(manifest)))
    more = frame(content + bytes(1 << 20))
    start = frame(content)[:5]
    width = 1 if len(content) < 256 else 2
    lie = more[:4] + start[4:5] + frame(content)[5 : 5 + width] + more[9:]
    with pytest.raises(FormatError, match="expected an intact zstd frame"):
        decode_sample(lie, manifest)


# Tars


def key_name(row: int) -> str:
    return f"{row + 1:016x}"


def labels_members(manifest: StoreManifest, rows: int) -> list[dict[str, bytes]]:
    return [{f"{key_name(row)}.soft.bin": encode_sample(make_labels(manifest, row, row + 1))} for row in range(rows)]


def make_set(folder: Path, members: list[dict[str, bytes]], images: bool = False) -> ShardManifest:
    shard = write_shard(folder / "labels-000000.tar", members)
    manifest = ShardManifest(labels=make_manifest(samples=len(members)), images=images, shards=(shard,))
    write_manifest(folder, manifest)
    return open_shards(folder)


def read(folder: Path, manifest: ShardManifest) -> list[SampleLabels]:
    return list(read_shard(folder, manifest.shards[0], manifest))


def test_a_tar_is_read_back(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, labels_members(make_manifest(), 4))
    for row, labels in enumerate(read(tmp_path, manifest)):
        assert_same(labels, make_labels(make_manifest(), row, row + 1))
    assert is_shards(tmp_path)


def test_the_headers_have_nothing_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    long = "folder/" * 40 + "é" * 30
    members = {f"{long}.jpg": b"jpeg", f"{long}.cls": b"1", "a.B": b"x" * 512}
    record = write_shard(path, [members])
    with tarfile.open(path) as tar:
        found = tar.getmembers()
        assert [member.name for member in found] == sorted(members)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in found} == {(0, 0, 0, "", "", 0o644)}
        contents = [stream.read() for member in found if (stream := tar.extractfile(member))]
    assert contents == [members[name] for name in sorted(members)]
    assert record.digest == hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    assert record == write_shard(tmp_path / "b.tar", [members]).model_copy(update={"name": "a.tar"})
    # frozen: these bytes are the same on every machine
    assert record.digest == "566a2ff59e40741d"


def test_names_are_those_of_the_keys(tmp_path: Path) -> None:
    labels = labels_members(make_manifest(), 2)
    [data] = labels[1].values()
    manifest = make_set(tmp_path, [labels[0], {f"{key_name(2)}.soft.bin": data}])
    with pytest.raises(FormatError, match=rf"{key_name(2)}: expected the labels of key {key_name(1)} alone, under"):
        read(tmp_path, manifest)


def image_sample(row: int, name: str = "a/1", **changes: bytes) -> dict[str, bytes]:
    image = b"jpeg of %d" % row
    labels = make_labels(make_manifest(), row, key_digest(f"{name}.jpg"))._replace(crc32=zlib.crc32(image))
    members = {"jpg": image, "cls": b"3", "soft.bin": encode_sample(labels)} | changes
    return {f"{name}.{suffix}": data for suffix, data in members.items() if data}


def test_images_must_be_those_of_the_labels(tmp_path: Path) -> None:
    for change in ({"jpg": b"other"}, {"jpg": b""}, {"cls": b""}, {"png": b"more"}, {"soft.bin": b""}):
        manifest = make_set(tmp_path, [image_sample(0), image_sample(1, "a/2", **change)], images=True)
        with pytest.raises(FormatError, match=r"labels-000000.tar: a/2: expected "):
            read(tmp_path, manifest)
    manifest = make_set(tmp_path, [image_sample(0), image_sample(1, "a/2")], images=True)
    assert [labels.key for labels in read(tmp_path, manifest)] == [key_digest("a/1.jpg"), key_digest("a/2.jpg")]
    renamed = {name.replace("a/2", "a/3"): data for name, data in image_sample(1, "a/2").items()}
    manifest = make_set(tmp_path, [image_sample(0), renamed], images=True)
    with pytest.raises(FormatError, match=r"with their image and its class, found a/3.cls, a/3.jpg, a/3.soft.bin"):
        read(tmp_path, manifest)


def crafted(folder: Path, write: Callable[[Path], object]) -> ShardManifest:
    """A set whose manifest agrees with a tar that was not made by this project."""
    manifest = make_set(folder, labels_members(make_manifest(), 2))
    write(folder / "labels-000000.tar")
    digest = hashlib.blake2b((folder / "labels-000000.tar").read_bytes(), digest_size=8).hexdigest()
    record = ShardRecord(name="labels-000000.tar", samples=2, digest=digest)
    return manifest.model_copy(update={"shards": (record,)})


def link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(f"{key_name(0)}.soft.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def sized(size: int, name: bytes = b"0.soft.bin") -> Callable[[Path], object]:
    header = bytearray(tarfile.TarInfo("0.soft.bin").tobuf())
    header[: len(name)] = name
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # pyright: ignore[reportAttributeAccessIssue]
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    return lambda path: path.write_bytes(bytes(header) + bytes(1024))


@pytest.mark.parametrize(
    "write",
    [
        link,
        sized(2**40),
        sized(-5),
        sized(0, b"\xff\xfe.soft.bin"),
        lambda path: write_tar(path, [("readme.txt", b"hello")]),
        lambda path: write_tar(path, [], format=tarfile.GNU_FORMAT),
        lambda path: write_shard(path, labels_members(make_manifest(), 3)),
        lambda path: write_shard(path, labels_members(make_manifest(), 1)),
        lambda path: write_shard(path, labels_members(make_manifest(k=2), 2)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a tar" * 200),
    ],
)
def test_crafted_tars_are_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    manifest = crafted(tmp_path, write)
    with pytest.raises(FormatError, match=r"^\S*labels-000000.tar: .*expected .*, found"):
        read(tmp_path, manifest)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_are_read(tmp_path: Path, format: int) -> None:
    members = [part for sample in labels_members(make_manifest(), 2) for part in sample.items()]
    manifest = crafted(tmp_path, lambda path: write_tar(path, members, format=format))
    assert len(read(tmp_path, manifest)) == 2


def test_a_changed_or_missing_tar_is_named(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, labels_members(make_manifest(), 2))
    path = tmp_path / "labels-000000.tar"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=f"^{path}: expected a file with digest {manifest.shards[0].digest}, found"):
        read(tmp_path, manifest)
    path.unlink()
    with pytest.raises(FormatError, match=f"^{path}: expected a file of a set of shards, found none"):
        read(tmp_path, manifest)
    path.mkdir()
    with pytest.raises(DataError, match=f"^{path}: expected a file that can be read, found: Is a directory"):
        read(tmp_path, manifest)


# manifest.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "softshard-labels"}, "format: Input should be 'softshard-shards'"),
        ({"version": 2}, "version: Input should be 1"),
        ({"shards": []}, "differ in the number of samples"),
        ({"shards": [{"name": "../labels-000000.tar", "samples": 2, "digest": ""}]}, "are named labels-000000.tar"),
        ({"shards": [{"name": "labels-000000.tar", "samples": 0, "digest": ""}]}, "greater than or equal to 1"),
        ({"color": 1}, "color: Extra inputs"),
        ({"images": True}, "it was damaged or edited"),
        ({"digest": None}, "it was damaged or edited"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    make_set(tmp_path, labels_members(make_manifest(), 2))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message) as caught:
        open_shards(tmp_path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("text", "found"), [("", "Expecting value"), ("[1]", "a list"), ("{", "Expecting")])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, found: str) -> None:
    make_set(tmp_path, labels_members(make_manifest(), 2))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(FormatError, match=f"expected a manifest.* found.*{found}"):
        open_shards(tmp_path)


def test_a_folder_without_its_manifest_is_still_known(tmp_path: Path) -> None:
    assert not is_shards(tmp_path)
    assert not is_shards("s3://bucket/labels.zarr")
    make_set(tmp_path, labels_members(make_manifest(), 2))
    (tmp_path / "manifest.json").unlink()
    assert is_shards(tmp_path)
    with pytest.raises(FormatError, match=r"manifest.json: expected a file of a set of shards, found none"):
        open_shards(tmp_path)
