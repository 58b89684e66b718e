"""Labeling that is killed at any moment, shared between launches, or both, ends in the same store."""

import random
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from helpers.small_runs import LABEL, make_inputs, write_recipe
from helpers.small_stores import files_of
from helpers.workers import finish, kill, labeling, start

from softshard.pipeline.store.store import open_store

MANY_BLOCKS = LABEL.replace("count: 3", "count: 10").replace("block_rows: 24", "block_rows: 8")
MANY_BLOCKS += "template: {{views: 4}}\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(make_inputs(tmp_path_factory.mktemp("kills")), "label", MANY_BLOCKS)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> tuple[dict[str, bytes], float]:
    """The files of a store that one process made without interruption, and the seconds it took."""
    store = recipe.parent / "labels.zarr"
    finish(start(labeling(recipe, store), 1))  # the server imports everything
    shutil.rmtree(store)
    started = time.monotonic()
    assert finish(start(labeling(recipe, store), 1)) == [0]
    return files_of(store), time.monotonic() - started


@pytest.mark.parametrize(
    ("processes", "kills"),
    [(1, 3), (3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 8), (2, 6), (3, 6)))],
)
def test_kills_at_random_moments_end_in_the_same_store(
    recipe: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path, processes: int, kills: int
) -> None:
    expected, seconds = uninterrupted
    moments, labeled, store = random.Random(processes), [], tmp_path / "labels.zarr"
    for number in range(kills):
        workers = start(labeling(recipe, store), processes)
        if number % 4 < 3:  # every fourth kill may come before a block is written
            until_written(store, workers)
        time.sleep(moments.uniform(0, 0.7) * seconds)
        running = any(worker.is_alive() for worker in workers)
        kill(workers)
        labeled.append(int(open_store(store).coverage().sum()) if store.exists() else 0)
        if not running:  # it was done before it could be killed
            assert files_of(store) == expected
            shutil.rmtree(store)
    assert finish(start(labeling(recipe, store), processes)) == [0] * processes
    assert files_of(store) == expected
    assert any(0 < blocks < 90 for blocks in labeled), f"no kill came while blocks were written: {labeled}"


def until_written(store: Path, workers: list[ForkServerProcess]) -> None:
    """Wait for a new block, or for the end."""
    before, deadline = blocks_written(store), time.monotonic() + 120
    while blocks_written(store) == before and any(worker.is_alive() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def blocks_written(store: Path) -> int:
    return sum(1 for path in (store / "block_digest").rglob("c/*/*") if path.name.isdecimal())


def test_launches_at_once_share_the_views(
    recipe: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    parts = [range(5), range(5, 8), range(8, 10)]
    launches = [
        start(labeling(recipe, tmp_path / "labels.zarr", part), processes)
        for processes, part in zip((2, 1, 1), parts, strict=True)
    ]
    assert [finish(workers) for workers in launches] == [[0, 0], [0], [0]]
    assert files_of(tmp_path / "labels.zarr") == uninterrupted[0]


def test_launches_at_once_on_the_same_views_are_harmless(
    recipe: Path, uninterrupted: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    launches = [start(labeling(recipe, tmp_path / "labels.zarr"), 1) for _ in range(2)]
    assert [finish(workers) for workers in launches] == [[0], [0]]
    assert files_of(tmp_path / "labels.zarr") == uninterrupted[0]
