"""The store: what is written is read back, any order and any number of writers give the same bytes."""

import doctest
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.small_stores import (
    SETTINGS,
    assert_equal,
    block_digest,
    create,
    damaged_bytes,
    files_of,
    fill,
    make_codes,
    make_manifest,
    make_template,
    missing,
    plain_array,
    read_all,
    refuse_writes,
)
from hypothesis import given
from hypothesis import strategies as st

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import Codes

FORMAT_PAGE = ROOT / "docs/format.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "whole.zarr"
    fill(create(path, make_manifest()))
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of a fully labeled store, to be damaged."""
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
        blocks = missing(store)
        assert blocks == [(v, b) for v in range(manifest.views.count) for b in range(store.blocks)]
        order.shuffle(blocks)
        fill(store, blocks)
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
    with pytest.raises(DataError, match="view 1: expected all 3 blocks labeled, found 1"):
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
    blocks = [(view, block) for view in range(2) for block in range(3)]
    for name, order in (("a", blocks), ("b", blocks[::-1]), ("c", blocks + blocks[2:4])):
        fill(create(tmp_path / name, manifest), order)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_threads_write_different_blocks_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    blocks = missing(create(path, make_manifest(samples=64, views=4)))
    threads = [threading.Thread(target=fill, args=(open_store(path), blocks[rank::4])) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fill(create(tmp_path / "alone.zarr", make_manifest(samples=64, views=4)))
    assert files_of(path) == files_of(tmp_path / "alone.zarr")


def test_processes_write_different_blocks_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    store = create(path, make_manifest(samples=64, views=4))
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"from helpers import small_stores; store = small_stores.open_store(pathlib.Path({str(path)!r}))\n"
        "blocks = small_stores.missing(store)[1::2]; print('ready', flush=True); sys.stdin.readline()\n"
        "small_stores.fill(store, blocks)"
    )
    blocks = missing(store)
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        print(file=other.stdin, flush=True)
        fill(store, blocks[::2])
    assert other.returncode == 0
    fill(create(tmp_path / "alone.zarr", make_manifest(samples=64, views=4)))
    assert files_of(path) == files_of(tmp_path / "alone.zarr")


def test_writing_leaves_metadata_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    create(path, make_manifest())
    before = {file: file.stat().st_mtime_ns for file in path.rglob("zarr.json")}
    for file in before:
        file.chmod(0o444)
    fill(open_store(path))
    assert {file: file.stat().st_mtime_ns for file in path.rglob("zarr.json")} == before


def test_a_second_writer_of_a_block_is_harmless_or_refused(path: Path) -> None:
    store, before = open_store(path), files_of(path)
    codes = store.read_block(0, 1)
    store.write_block(0, 1, codes)
    other = Codes(codes.index, codes.gap, codes.tail ^ np.uint8(1))
    with pytest.raises(DataError, match=r"view 0, block 1: expected it not labeled yet.*--views"):
        store.write_block(0, 1, other)
    assert files_of(path) == before


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
    assert files_of(path) == files_of(tmp_path / "at_once.zarr")
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
        with pytest.raises(DataError, match="tail template, block 0: expected it not labeled yet"):
            store.write_template(0, store.read_template(0) ^ np.uint8(1))


def test_the_format_pages_example_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testfile(str(FORMAT_PAGE), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert failed == 0, "see the captured output"
    assert attempted > 10
