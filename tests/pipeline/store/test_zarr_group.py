"""A store's files: everything damaged, missing or of another layout is noticed, a full disk loses one block at most."""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.small_stores import (
    CODE_ARRAYS,
    assert_equal,
    block_digest,
    chunk_files,
    create,
    damaged_bytes,
    files_of,
    fill,
    make_codes,
    make_manifest,
    missing,
    plain_array,
    read_all,
    refuse_writes,
)

from softshard.pipeline.images.manifest import document_digest
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.location import Folder
from softshard.pipeline.store.store import create_store, open_store
from softshard.pipeline.store.topk import Codes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A fully labeled store, to be damaged."""
    fill(create(tmp_path / "labels.zarr", make_manifest()))
    return tmp_path / "labels.zarr"


def test_metadata_with_any_changed_byte_is_noticed_or_means_the_same(path: Path) -> None:
    opened = 0
    for file in sorted(path.rglob("zarr.json")):
        good = file.read_bytes()
        for position in range(0, len(good), 23 if file.parent == path else 11):
            file.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :])
            with suppress(FormatError, DataError):
                store = open_store(path)  # as after a flip in the name of a key whose value is the default
                assert store.manifest == make_manifest()
                read_all(path)
                opened += 1
        file.write_bytes(good)
    assert opened < 20, "most flips must be noticed"


def test_a_flipped_or_lost_byte_anywhere_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    fill(create(path, make_manifest(samples=6)))
    files = chunk_files(path)
    assert {file.relative_to(path).parts[0] for file in files} == {*CODE_ARRAYS, "key", "crc32", "block_digest"}
    for file in files:
        name, _, *position = file.relative_to(path).parts
        good = file.read_bytes()
        where = name if name in ("key", "crc32") else f"view {position[0]}, block {position[1]}: {name}"
        for bad in damaged_bytes(good):
            file.write_bytes(bad)
            with pytest.raises(FormatError) as caught:
                read_all(path)
            assert where in str(caught.value)
            assert str(path) in str(caught.value)
            assert "label again" in str(caught.value)
        file.write_bytes(good)
    read_all(path)


def test_a_damaged_digest_is_named_when_labeling_resumes(path: Path) -> None:
    file = path / "block_digest" / "c" / "1" / "2"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    store = open_store(path)
    with pytest.raises(FormatError, match=r"view 1, block 2: block_digest.*delete .*block_digest/c/1/2"):
        store.digests()


def test_a_missing_chunk_is_never_data(path: Path) -> None:
    for file in chunk_files(path):
        name = file.relative_to(path).parts[0]
        good = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError if name == "block_digest" else FormatError):
            read_all(path)
        file.write_bytes(good)
    read_all(path)


@pytest.mark.parametrize("array", CODE_ARRAYS)
@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_a_chunk_of_another_block_is_caught(path: Path, array: str, other: tuple[int, int]) -> None:
    here, there = (path / array / "c" / str(v) / str(b) for v, b in ((0, 0), other))
    if array != "tail":
        here, there = here / "0", there / "0"
    shutil.copy(there, here)
    with pytest.raises(FormatError, match="view 0, block 0: expected content with digest"):
        read_all(path)


def test_a_whole_block_at_another_position_is_caught(path: Path) -> None:
    """Its codes agree with its digest; only the position is wrong."""
    for array in (*CODE_ARRAYS, "block_digest"):
        source, target = (path / array / "c" / str(view) / "1" for view in (0, 1))
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)
    assert_equal(open_store(path).read_view(0), make_codes(make_manifest(), 0))
    with pytest.raises(FormatError, match="view 1, block 1: expected content with digest"):
        open_store(path).read_view(1)


def test_a_damaged_block_is_labeled_again_as_its_error_says(path: Path) -> None:
    before = files_of(path)
    for block in (0, 2):  # a full one and the short last one
        for array in ("topk_index/c/1/{}/0", "topk_gap/c/1/{}/0", "tail/c/1/{}"):
            (path / array.format(block)).write_bytes(b"damaged")
        (path / f"block_digest/c/1/{block}").unlink()
    store = open_store(path)
    assert missing(store) == [(1, 0), (1, 2)]
    fill(store)
    read_all(path)
    assert files_of(path) == before


def test_an_index_that_is_no_class_is_caught(path: Path) -> None:
    good = open_store(path).read_block(0, 1)
    bad = Codes(good.index.copy(), good.gap, good.tail)
    bad.index[2, 1] = 7
    plain_array(path, "topk_index")[0, 4:8] = bad.index
    plain_array(path, "block_digest")[0, 1] = block_digest(0, 1, bad)
    with pytest.raises(FormatError, match="view 0, block 1: expected classes below 7, found 7"):
        open_store(path).read_view(0)


def test_chunks_of_fill_values_are_written(tmp_path: Path) -> None:
    store = create_store(
        tmp_path / "labels.zarr", make_manifest(samples=1), np.zeros(1, np.uint64), np.zeros(1, np.uint32)
    )
    fills = Codes(np.full((1, 3), 6, np.uint16), np.full((1, 2), 255, np.uint8), np.full(1, 255, np.uint8))
    store.write_block(1, 0, fills)
    again = open_store(Path(store.name))
    assert_equal(again.read_view(1), fills)
    assert (again.keys.tolist(), again.crc32.tolist()) == ([0], [0])
    assert {file.relative_to(Path(store.name)).parts[0] for file in chunk_files(Path(store.name))} >= {
        "topk_gap",
        "tail",
        "key",
    }


@pytest.mark.parametrize("write", range(4))
def test_a_full_disk_leaves_the_block_not_labeled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    store = create(tmp_path / "labels.zarr", make_manifest())
    fill(store, [(0, 0)])
    with monkeypatch.context() as patch:
        refuse_writes(patch, after=write)
        with pytest.raises(DataError, match="No space left"):
            fill(store, [(0, 1)])
    store = open_store(Path(store.name))
    assert (0, 1) in missing(store)
    assert (0, 0) not in missing(store)
    assert not list(Path(store.name).rglob("*.partial"))
    fill(store)
    read_all(Path(store.name))


@pytest.mark.parametrize("write", [0, 3, 8])
def test_a_full_disk_leaves_no_half_made_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    accept, left = Path.write_bytes, [write]

    def write_or_refuse(self: Path, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return accept(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_or_refuse)
    with pytest.raises(DataError, match="No space left"):
        create(tmp_path / "labels.zarr", make_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_never_created_over_something(path: Path, tmp_path: Path) -> None:
    before = files_of(path)
    with pytest.raises(DataError, match="expected a free name"):
        create(path, make_manifest())
    assert files_of(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_faster_of_two_creators_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.zarr"
    create(path, make_manifest())
    before = files_of(path)
    with monkeypatch.context() as patch:
        seen = iter([False])  # as seen a moment earlier
        exists = Folder.exists
        patch.setattr(Folder, "exists", lambda self: next(seen, None) is not False and exists(self))
        assert create(path, make_manifest(samples=9)).manifest == make_manifest()
    assert files_of(path) == before
    assert list(tmp_path.iterdir()) == [path]


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_manifest(key: str, value: object, resealed: bool = True) -> Callable[[Path], None]:
    def change(data: dict) -> None:
        manifest = data["attributes"]["softshard"]
        manifest[key] = value
        if resealed:
            content = {name: manifest[name] for name in manifest if name != "digest"}
            manifest["digest"] = document_digest(content)

    return lambda path: edit(path / "zarr.json", change)


def edit_array(name: str, key: str, value: object) -> Callable[[Path], None]:
    return lambda path: edit(path / name / "zarr.json", lambda data: data.update({key: value}))


def without_checksum(path: Path) -> None:
    edit(path / "key" / "zarr.json", lambda data: data["codecs"].pop())


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        shutil.rmtree(path)
        make(path)

    return replace


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, DataError, "found nothing there"),
        (replaced(lambda path: path.write_text("x")), FormatError, "found a file"),
        (replaced(Path.mkdir), FormatError, "expected a store of labels"),
        (replaced(lambda path: zarr.create_array(path, shape=3, dtype="u1")), FormatError, "a zarr v3 group"),
        (replaced(lambda path: zarr.open_group(path, mode="w")), FormatError, "found no manifest"),
        (edit_manifest("format", "softshard-beton"), FormatError, "found format softshard-beton"),
        (edit_manifest("version", 2), FormatError, "format version 2, this softshard reads 1"),
        (edit_manifest("color", 1), FormatError, "color: Extra inputs"),
        (edit_manifest("top_k", "three"), FormatError, "top_k: Input should be a valid integer"),
        (lambda path: (path / "zarr.json").write_text("{"), FormatError, "expected a store of labels"),
        (edit_manifest("class_list_digest", "abd", resealed=False), FormatError, "it was damaged or edited"),
        (edit_manifest("digest", None, resealed=False), FormatError, "manifest with digest None, found"),
        (edit_manifest("samples", 11), FormatError, r"key: .* found shape \(10,\) \(not \(11,\)\)"),
        (edit_manifest("top_k", 4), FormatError, r"topk_index: .* found shape"),
        (edit_manifest("block_rows", 5), FormatError, r"topk_index: .* found chunk_grid"),
        (edit_manifest("classes", 65535), FormatError, r"topk_index: .* found data_type uint16 \(not uint32\)"),
        (edit_array("tail", "data_type", "int8"), FormatError, "tail: .* found"),
        (edit_array("tail", "shape", None), FormatError, "tail: expected an array"),
        (without_checksum, FormatError, "key: .* found codecs"),
        (lambda path: (path / "crc32" / "zarr.json").write_bytes(b"\xff"), FormatError, "crc32: expected an array"),
        (lambda path: shutil.rmtree(path / "topk_gap"), FormatError, "topk_gap: expected an array"),
        (lambda path: edit(path / "tail/zarr.json", lambda d: (d.clear(), d.update(zarr_format=3, node_type="group"))),
         FormatError, "tail: expected an array, found a group"),
    ],
)  # fmt: skip
def test_what_is_no_store_is_refused(path: Path, damage: Callable, error: type[Exception], message: str) -> None:
    damage(path)
    with pytest.raises(error, match=message) as caught:
        open_store(path)
    assert str(caught.value).startswith(str(path))


def test_unknown_arrays_are_left_alone(path: Path) -> None:
    zarr.open_group(path, mode="r+").create_array("note", shape=3, dtype="u1")
    read_all(path)


def test_plain_zarr_opens_a_store(path: Path) -> None:
    group, manifest = zarr.open_group(path, mode="r"), make_manifest()
    dimensions = {name: getattr(array.metadata, "dimension_names", None) for name, array in group.arrays()}
    assert dimensions == {
        "key": ("sample",),
        "crc32": ("sample",),
        "topk_index": ("view", "sample", "rank"),
        "topk_gap": ("view", "sample", "step"),
        "tail": ("view", "sample"),
        "block_digest": ("view", "block"),
    }
    index, gap, tail = (np.asarray(plain_array(path, name)[1]) for name in CODE_ARRAYS)
    assert_equal(Codes(index, gap, tail), make_codes(manifest, 1))
    attribute = group.attrs["softshard"]
    assert isinstance(attribute, dict)
    assert {name: value for name, value in attribute.items() if name != "digest"} == manifest.model_dump(mode="json")
    assert plain_array(path, "topk_index").fill_value >= manifest.classes


def test_stored_bytes_are_the_chunks_on_disk(path: Path) -> None:
    found = open_store(path).stored_bytes()
    for name in CODE_ARRAYS:
        files = [file for file in chunk_files(path) if file.relative_to(path).parts[0] == name]
        assert found[name] == sum(file.stat().st_size for file in files)
