"""The store: what is written is read back, everything damaged or missing is noticed, any order gives the same bytes."""

import doctest
import errno
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from pipeline import store as store_module
from pipeline.errors import DataError, FormatError
from pipeline.manifest import StoreManifest, TeacherRecord, document_digest
from pipeline.places import Folder
from pipeline.recipe import TemplateRecipe, ViewRecipe
from pipeline.store import Store, block_digest, create_store, open_store
from pipeline.topk import Codes, index_dtype

FORMAT_PAGE = Path(store_module.__file__).with_name("FORMAT.md")
CODE_ARRAYS = ("topk_index", "topk_gap", "tail")
SETTINGS = settings(derandomize=True, deadline=None, max_examples=15)


def make_manifest(
    samples: int = 10, classes: int = 7, k: int = 3, block_rows: int = 4, views: int = 2, template: int | None = None
) -> StoreManifest:
    teacher = TeacherRecord(
        model="resnet10t",
        library="timm",
        weights_digest="00",
        size=32,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        weight=1.0,
    )
    return StoreManifest(
        samples=samples,
        classes=classes,
        top_k=k,
        block_rows=block_rows,
        batch_size=2,
        class_list_digest="abc",
        views=ViewRecipe(seed=2**64 - 1, count=views),
        teachers=(teacher,),
        ensemble="probabilities",
        flip_average=False,
        template=TemplateRecipe(views=template) if template else None,
        precision="float32",
        channels_last=True,
        compile=False,
        probes=(),
        libraries={"zarr": "3"},
    )


def make_codes(manifest: StoreManifest, view: int) -> Codes:
    """The codes of a whole view: random, and the same for the same manifest and view."""
    rng = np.random.default_rng(view)
    n, k, classes = manifest.samples, manifest.top_k, manifest.classes
    index = rng.integers(classes - min(classes, 1000), classes, (n, k)).astype(index_dtype(classes))
    return Codes(index, rng.integers(0, 256, (n, k - 1), np.uint8), rng.integers(0, 256, n, np.uint8))


def make_template(manifest: StoreManifest) -> np.ndarray:
    """The tail template of all rows: random, and the same for the same manifest."""
    return np.random.default_rng(99).integers(0, 256, (manifest.samples, manifest.classes), np.uint8)


def missing(store: Store) -> list[tuple[int, int]]:
    return [(int(view), int(block)) for view, block in np.argwhere(store.digests() == 0)]


def create(path: Path | str, manifest: StoreManifest) -> Store:
    rng = np.random.default_rng(7)
    keys = rng.integers(0, 2**64, manifest.samples, np.uint64)
    return create_store(path, manifest, keys, rng.integers(0, 2**32, manifest.samples, np.uint32))


def fill(store: Store, places: list[tuple[int, int]] | None = None) -> None:
    for view, block in missing(store) if places is None else places:
        store.write_block(view, block, make_codes(store.manifest, view)[store.rows(block)])
    for block in range(store.blocks) if store.manifest.template and places is None else ():
        store.write_template(block, make_template(store.manifest)[store.rows(block)])


def assert_equal(found: Codes, expected: Codes) -> None:
    for name in ("index", "gap", "tail"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(a, b, strict=True)


def read_all(path: Path | str) -> None:
    store = open_store(path)
    for view in range(store.manifest.views.count):
        assert_equal(store.read_view(view), make_codes(store.manifest, view))
    if store.manifest.template:
        np.testing.assert_array_equal(store.read_template(), make_template(store.manifest), strict=True)


def plain_array(path: Path, name: str) -> zarr.Array:
    array = zarr.open_group(path, mode="r+")[name]
    assert isinstance(array, zarr.Array)
    return array


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "whole.zarr"
    fill(create(path, make_manifest()))
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of a fully labelled store, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "labels.zarr"))


@given(
    manifest=st.builds(
        make_manifest,
        samples=st.integers(1, 20),
        classes=st.sampled_from([5, 65534, 65535]),
        k=st.integers(1, 5),
        block_rows=st.integers(1, 8),
        views=st.integers(1, 3),
    ),
    order=st.randoms(use_true_random=False),
)
@SETTINGS
def test_what_is_written_is_read_back(manifest: StoreManifest, order: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.zarr"
        store = create(path, manifest)
        places = missing(store)
        assert places == [(v, b) for v in range(manifest.views.count) for b in range(store.blocks)]
        order.shuffle(places)
        fill(store, places)
        again = open_store(path)
        assert again.manifest == manifest
        np.testing.assert_array_equal(again.keys, store.keys, strict=True)
        np.testing.assert_array_equal(again.crc32, store.crc32, strict=True)
        assert missing(again) == []
        read_all(path)


@pytest.mark.parametrize(("k", "classes"), [(1, 7), (7, 7), (1, 70000)])
def test_one_class_and_all_classes(tmp_path: Path, k: int, classes: int) -> None:
    path = tmp_path / "labels.zarr"
    fill(create(path, make_manifest(k=k, classes=classes)))
    read_all(path)
    assert (path / "topk_gap").exists() == (k > 1)
    assert (open_store(path).stored_bytes()["topk_gap"] > 0) == (k > 1)


def test_resume_continues_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    store = create(path, make_manifest(views=3))
    assert store.blocks == 3
    fill(store, [(1, 2), (0, 0), (2, 0), (2, 1), (2, 2)])
    store = open_store(path)
    assert missing(store) == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert store.coverage().tolist() == [1, 1, 3]
    assert_equal(store.read_view(2), make_codes(store.manifest, 2))
    with pytest.raises(DataError, match="view 1: expected all 3 blocks labelled, found 1"):
        store.read_view(1)
    with pytest.raises(DataError, match="view 1, block 0: expected soft labels, found none"):
        store.read_block(1, 0)
    fill(store)
    read_all(path)


def test_views_and_blocks_outside_the_store_are_refused(path: Path) -> None:
    store = open_store(path)
    for view, block in ((2, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(AssertionError):
            store.read_block(view, block)
    with pytest.raises(AssertionError, match="class 7 of 7"):
        store.write_block(0, 0, Codes(np.full((4, 3), 7, np.uint16), np.zeros((4, 2), np.uint8), np.zeros(4, np.uint8)))


def test_any_order_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = make_manifest(samples=45_000, classes=1000, k=10, block_rows=20_000)  # blosc splits these chunks
    places = [(view, block) for view in range(2) for block in range(3)]
    for name, order in (("a", places), ("b", places[::-1]), ("c", places + places[2:4])):
        fill(create(tmp_path / name, manifest), order)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_threads_write_different_blocks_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    places = missing(create(path, make_manifest(samples=64, views=4)))
    threads = [threading.Thread(target=fill, args=(open_store(path), places[rank::4])) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fill(create(tmp_path / "alone.zarr", make_manifest(samples=64, views=4)))
    assert contents(path) == contents(tmp_path / "alone.zarr")


def test_processes_write_different_blocks_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    store = create(path, make_manifest(samples=64, views=4))
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_store; store = test_store.open_store(pathlib.Path({str(path)!r}))\n"
        "places = test_store.missing(store)[1::2]; print('ready', flush=True); sys.stdin.readline()\n"
        "test_store.fill(store, places)"
    )
    places = missing(store)
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        print(file=other.stdin, flush=True)
        fill(store, places[::2])
    assert other.returncode == 0
    fill(create(tmp_path / "alone.zarr", make_manifest(samples=64, views=4)))
    assert contents(path) == contents(tmp_path / "alone.zarr")


def test_writing_leaves_metadata_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    create(path, make_manifest())
    before = {file: file.stat().st_mtime_ns for file in path.rglob("zarr.json")}
    for file in before:
        file.chmod(0o444)
    fill(open_store(path))
    assert {file: file.stat().st_mtime_ns for file in path.rglob("zarr.json")} == before


def test_a_second_writer_of_a_block_is_harmless_or_refused(path: Path) -> None:
    store, before = open_store(path), contents(path)
    codes = store.read_block(0, 1)
    store.write_block(0, 1, codes)
    other = Codes(codes.index, codes.gap, codes.tail ^ np.uint8(1))
    with pytest.raises(DataError, match=r"view 0, block 1: expected it not labelled yet.*--views"):
        store.write_block(0, 1, other)
    assert contents(path) == before


def test_two_writers_of_one_block_at_a_time_never_leave_false_codes(tmp_path: Path) -> None:
    """Their codes differ, as on two kinds of device: one of them stands, or the block counts as damaged."""
    manifest = make_manifest(samples=400, block_rows=400, views=12)
    store = create(tmp_path / "labels.zarr", manifest)
    sides = [[make_codes(manifest, view), make_codes(manifest, 100 + view)] for view in range(12)]

    def write(side: int) -> None:
        mine = open_store(tmp_path / "labels.zarr")
        for view in range(12):
            with suppress(DataError):
                mine.write_block(view, 0, sides[view][side])

    threads = [threading.Thread(target=write, args=(side,)) for side in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for view in range(12):
        with suppress(FormatError):
            digest = block_digest(view, 0, store.read_block(view, 0))
            assert digest in [block_digest(view, 0, codes) for codes in sides[view]]


@pytest.mark.parametrize("template", [None, 2])
def test_a_store_grows_and_is_then_as_if_it_had_been_made_so(tmp_path: Path, template: int | None) -> None:
    path = tmp_path / "labels.zarr"
    fill(create(path, make_manifest(template=template)))
    open_store(path).grow(4)
    store = open_store(path)
    assert store.coverage().tolist() == [3, 3, 0, 0]
    fill(store)
    fill(create(tmp_path / "at_once.zarr", make_manifest(views=4, template=template)))
    assert contents(path) == contents(tmp_path / "at_once.zarr")
    read_all(path)


@pytest.mark.parametrize("write", range(5))
def test_growth_that_is_cut_off_leaves_the_store_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    with monkeypatch.context() as patch:
        refuse_writes(patch, after=write)
        with pytest.raises(DataError, match="No space left"):
            open_store(path).grow(4)
    assert open_store(path).manifest == make_manifest()
    read_all(path)
    open_store(path).grow(4)
    fill(open_store(path))
    read_all(path)


def test_some_rows_are_read_without_the_others(path: Path) -> None:
    store, codes = open_store(path), make_codes(make_manifest(), 1)
    rows = np.array([9, 0, 3, 0, 8, 1])
    assert_equal(store.read_rows(1, rows), codes[rows])
    (path / "tail/c/1/1").unlink()  # rows 4 to 7
    assert_equal(store.read_rows(1, rows), codes[rows])
    with pytest.raises(FormatError, match="view 1, block 1"):
        store.read_rows(1, np.array([0, 5]))


class TestTemplate:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        fill(create(tmp_path / "labels.zarr", make_manifest(template=2)))
        return tmp_path / "labels.zarr"

    def test_it_is_read_back(self, path: Path) -> None:
        read_all(path)
        store = open_store(path)
        np.testing.assert_array_equal(store.read_template(2), make_template(store.manifest)[8:])
        assert store.stored_bytes()["tail_template"] > 0
        assert plain_array(path, "tail_template").shape == (10, 7)

    def test_what_is_missing_is_said(self, tmp_path: Path) -> None:
        store = create(tmp_path / "labels.zarr", make_manifest(template=2))
        assert store.template_digests().tolist() == [0, 0, 0]
        with pytest.raises(DataError, match="tail template, block 0: expected a template, found none yet"):
            store.read_template()

    @pytest.mark.parametrize("name", ["tail_template/c/1/0", "template_digest/c/1"])
    def test_damage_is_named(self, path: Path, name: str) -> None:
        good = (path / name).read_bytes()
        for bad in damaged_bytes(good):
            (path / name).write_bytes(bad)
            with pytest.raises(FormatError, match=r"tail template, block 1.*delete .*template_digest/c/1"):
                open_store(path).read_template()
        (path / name).unlink()
        with pytest.raises(FormatError if name.startswith("tail") else DataError, match="tail template, block 1"):
            open_store(path).read_template()

    def test_the_template_of_another_block_is_caught(self, path: Path) -> None:
        for name in ("tail_template/c/{}/0", "template_digest/c/{}"):
            shutil.copy(path / name.format(0), path / name.format(1))
        with pytest.raises(FormatError, match="block 1: expected content with digest"):
            open_store(path).read_template(1)

    def test_another_template_is_refused(self, path: Path) -> None:
        store = open_store(path)
        store.write_template(0, store.read_template(0))
        with pytest.raises(DataError, match="tail template, block 0: expected it not labelled yet"):
            store.write_template(0, store.read_template(0) ^ np.uint8(1))


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


def damaged_bytes(data: bytes) -> list[bytes]:
    positions = [i * (len(data) - 1) // 5 for i in range(6)]
    flipped = [data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :] for i in positions]
    return [*flipped, data[:-1], b"", bytes(len(data)), bytes(4)]


def test_a_flipped_or_lost_byte_anywhere_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    fill(create(path, make_manifest(samples=6)))
    files = chunk_files(path)
    assert {file.relative_to(path).parts[0] for file in files} == {*CODE_ARRAYS, "key", "crc32", "block_digest"}
    for file in files:
        name, _, *position = file.relative_to(path).parts
        good = file.read_bytes()
        place = f"{path}/{name}" if name in ("key", "crc32") else f"view {position[0]}, block {position[1]}: {name}"
        for bad in damaged_bytes(good):
            file.write_bytes(bad)
            with pytest.raises(FormatError) as caught:
                read_all(path)
            assert place.replace(f"{path}/", "") in str(caught.value)
            assert str(path) in str(caught.value)
            assert "label again" in str(caught.value)
        file.write_bytes(good)
    read_all(path)


def test_a_damaged_digest_is_named_when_labelling_resumes(path: Path) -> None:
    file = path / "block_digest" / "c" / "1" / "2"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    store = open_store(path)
    for look in (store.digests, store.coverage):
        with pytest.raises(FormatError, match=r"view 1, block 2: block_digest.*delete .*block_digest/c/1/2"):
            look()


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


def test_a_whole_block_in_another_place_is_caught(path: Path) -> None:
    """Its codes agree with its digest; only the place is wrong."""
    for array in (*CODE_ARRAYS, "block_digest"):
        source, target = (path / array / "c" / str(view) / "1" for view in (0, 1))
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)
    assert_equal(open_store(path).read_view(0), make_codes(make_manifest(), 0))
    with pytest.raises(FormatError, match="view 1, block 1: expected content with digest"):
        open_store(path).read_view(1)


def test_a_damaged_block_is_labelled_again_as_its_error_says(path: Path) -> None:
    before = contents(path)
    for block in (0, 2):  # a full one and the short last one
        for array in ("topk_index/c/1/{}/0", "topk_gap/c/1/{}/0", "tail/c/1/{}"):
            (path / array.format(block)).write_bytes(b"damaged")
        (path / f"block_digest/c/1/{block}").unlink()
    store = open_store(path)
    assert missing(store) == [(1, 0), (1, 2)]
    fill(store)
    read_all(path)
    assert contents(path) == before


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
def test_a_full_disk_leaves_the_block_not_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
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


def refuse_writes(patch: pytest.MonkeyPatch, after: int) -> None:
    accept, left = LocalStore.set, [after]

    async def set_or_refuse(*args) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        await accept(*args)

    patch.setattr(LocalStore, "set", set_or_refuse)


def test_a_store_is_never_created_over_something(path: Path, tmp_path: Path) -> None:
    before = contents(path)
    with pytest.raises(DataError, match="expected a free name"):
        create(path, make_manifest())
    assert contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_faster_of_two_creators_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.zarr"
    create(path, make_manifest())
    before = contents(path)
    with monkeypatch.context() as patch:
        seen = iter([False])  # as seen a moment earlier
        exists = Folder.exists
        patch.setattr(Folder, "exists", lambda self: next(seen, None) is not False and exists(self))
        assert create(path, make_manifest(samples=9)).manifest == make_manifest()
    assert contents(path) == before
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
        (edit_manifest("colour", 1), FormatError, "colour: Extra inputs"),
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


def test_the_format_pages_example_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testfile(str(FORMAT_PAGE), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert failed == 0, "see the captured output"
    assert attempted > 10
