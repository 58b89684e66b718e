import gc
import hashlib
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numba
import numpy as np
import psutil
import pytest
import torch
from helpers.small_loaders import CPU, RECIPE, RICH, SIZE, make, pixels
from helpers.small_packs import recipe_for

import softshard.pipeline.images.beton
import softshard.pipeline.views.loader
from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import (
    MixRecipe,
    ViewRecipe,
)
from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.views.parameters import view_parameters
from softshard.pipeline.views.render import find_partners


@pytest.fixture(scope="module")
def pairs(digits: Beton) -> tuple[np.ndarray, np.ndarray]:
    """Every row in views 0 to 3."""
    rows = np.tile(np.arange(len(digits)), 4)
    return rows, np.repeat(np.arange(4), len(digits))


@pytest.fixture(scope="module")
def expected(digits: Beton, pairs: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    return pixels(make(digits), *pairs)


@pytest.fixture
def copy(digits: Beton, tmp_path: Path) -> Path:
    """A copy of the digits to damage."""
    for suffix in (".beton", ".manifest.json"):
        (tmp_path / f"digits{suffix}").write_bytes(digits.path.with_suffix(suffix).read_bytes())
    return tmp_path / "digits.beton"


@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_pixels_do_not_depend_on_batches_and_workers(digits, pairs, expected, batch_size: int, workers: int) -> None:
    assert torch.equal(pixels(make(digits, batch_size, workers), *pairs), expected)


def test_pixels_do_not_depend_on_the_order(digits, pairs, expected) -> None:
    order = np.random.default_rng(0).permutation(len(pairs[0]))
    shuffled = pixels(make(digits), pairs[0][order], pairs[1][order])  # views mixed within batches
    assert torch.equal(shuffled, expected[order])


def test_overlapping_epochs_do_not_mix_their_views(digits, expected) -> None:
    loader, rows = make(digits), np.arange(len(digits))
    epochs = [loader.render(rows, view) for view in range(4)]
    parts: list[list[torch.Tensor]] = [[] for _ in epochs]
    for batches in zip(*epochs, strict=True):
        for part, batch in zip(parts, batches, strict=True):
            part.append(batch.images.clone())
    assert torch.equal(torch.cat([torch.cat(part) for part in parts]), expected)


def test_two_loaders_at_once_do_not_disturb_each_other(digits, pairs, expected) -> None:
    found: dict[int, torch.Tensor] = {}

    def work(workers: int) -> None:
        found[workers] = pixels(make(digits, 16, workers), *pairs)

    threads = [threading.Thread(target=work, args=(workers,)) for workers in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[1], expected)
    assert torch.equal(found[2], expected)


IN_ANOTHER_PROCESS = """
import hashlib, sys, numba, numpy as np, torch
threads = (3, numba.get_num_threads())
torch.set_num_threads(3)
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.views.render import render
beton = open_beton(sys.argv[1])
loader = ViewLoader(beton, ViewRecipe(seed=1, count=8), 24, 16, 2, torch.device("cpu"))
rows = np.tile(np.arange(len(beton)), 4)
images = torch.cat([batch.images.clone() for batch in loader.render(rows, np.repeat(np.arange(4), len(beton)))])
print(hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
print(sum(render.stats.cache_hits.values()), sum(render.stats.cache_misses.values()))
print(threads == (torch.get_num_threads(), numba.get_num_threads()))
"""


TWO_AT_ONCE = """
import hashlib, sys, threading, numpy as np, torch
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.recipes.recipe import ViewRecipe
beton = open_beton(sys.argv[1])
rows, views = np.tile(np.arange(len(beton)), 4), np.repeat(np.arange(4), len(beton))
def work():
    loader = ViewLoader(beton, ViewRecipe(seed=1, count=8), 24, 16, 2, torch.device("cpu"))
    images = torch.cat([batch.images.clone() for batch in loader.render(rows, views)])
    found.append(hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
found = []
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*found)
"""


def test_another_process_renders_the_same_without_compiling(digits, expected) -> None:
    command = [sys.executable, "-W", "error", "-c", IN_ANOTHER_PROCESS, str(digits.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(expected.contiguous().numpy().tobytes()).hexdigest()
    assert done.stdout.split() == [digest, "1", "0", "True"], "pixels, code from the disk, compiled, threads kept"


def test_a_forked_child_renders_the_same(digits, pairs, expected) -> None:
    def work(results) -> None:  # without torch's own operations: OpenMP, which they use, does not survive a fork
        images = [batch.images.numpy().copy() for batch in make(digits).render(*pairs)]
        results.put(hashlib.sha256(np.ascontiguousarray(np.concatenate(images)).tobytes()).hexdigest())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=work, args=(results,))
    child.start()
    assert results.get(timeout=60) == hashlib.sha256(expected.contiguous().numpy().tobytes()).hexdigest()
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(pixels(make(digits), *pairs), expected), "and the parent still renders"


def test_batches_say_which_rows_they_hold(digits) -> None:
    rows = np.array([5, 3, 3, 199, 0])
    batches = [(b.images.shape, b.rows.tolist(), b.labels.tolist()) for b in make(digits, 2).render(rows, 0)]
    labels = digits.labels
    assert batches == [
        ((2, 3, SIZE, SIZE), [5, 3], [labels[5], labels[3]]),
        ((2, 3, SIZE, SIZE), [3, 199], [labels[3], labels[199]]),
        ((1, 3, SIZE, SIZE), [0], [labels[0]]),
    ]
    [batch] = make(digits, 8).render(rows, 0)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images[1], batch.images[2])


def test_rows_and_views_may_change_once_they_are_given(digits, expected) -> None:
    rows, views = np.arange(len(digits)), np.zeros(len(digits), np.int64)
    batches = make(digits).render(rows, views)
    first = next(batches).images.clone()
    rows[:], views[:] = 0, 3
    rest = [(batch.images.clone(), batch.rows.copy()) for batch in batches]
    assert torch.equal(torch.cat([first, *(images for images, _ in rest)]), expected[: len(digits)])
    assert np.concatenate([rows for _, rows in rest]).tolist() == list(range(16, len(digits)))


def test_a_batch_stays_as_it_is_while_it_is_held(digits, expected) -> None:
    for batch in make(digits).render(np.arange(len(digits)), 0):
        time.sleep(0.02)  # the thread goes ahead as far as it can
        assert torch.equal(batch.images, expected[batch.rows])


@pytest.mark.parametrize("rows", [[-1], [0, 200], [2**40]])
def test_rows_that_do_not_exist(digits, rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        next(make(digits).render(np.array(rows), 0))


def test_no_rows(digits) -> None:
    assert list(make(digits).render(np.array([], np.int64), 0)) == []


def test_numbers_of_threads_are_left_alone(digits) -> None:
    """Also where torch has more threads than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(numba.get_num_threads() + 1)
    try:
        threads = torch.get_num_threads(), numba.get_num_threads()
        pixels(make(digits, workers=1), np.arange(20), 0)
        assert (torch.get_num_threads(), numba.get_num_threads()) == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("damage", ["header", "entropy"])
def test_a_damaged_image_is_named_and_the_loader_lives_on(copy: Path, damage: str) -> None:
    beton = open_beton(copy)
    position = int(beton.offsets[7] + (0 if damage == "header" else beton.lengths[7] // 2))
    with copy.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    loader = make(open_beton(copy))
    with pytest.raises(DataError, match=rf"found 1 that have changed, such as {beton.manifest.keys[7]}; copy the file"):
        pixels(loader, np.arange(len(beton)), 0)
    assert len(pixels(loader, np.arange(8, 40), 0)) == 32


def test_an_exception_in_the_decoding_thread_is_raised(digits, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise ValueError("inside an operation")

    monkeypatch.setattr(softshard.pipeline.views.loader, "render", Mock(side_effect=fail, signatures=[()]))
    with pytest.raises(RuntimeError, match="the decoding thread died") as error:
        pixels(make(digits), np.arange(20), 0)
    assert "inside an operation" in str(error.value.__cause__)


def test_what_a_thread_put_before_it_ended_is_not_lost(digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue was empty when it was asked, the thread had ended when that was asked: what it put between counts."""
    epoch = softshard.pipeline.views.loader._ViewEpoch(
        make(digits)._loader(1), np.arange(3), np.zeros((3, 1)), np.full((3, 1), -1), 2
    )
    epoch.join()
    get, late = epoch.output_queue.get, iter([queue.Empty])

    def get_late(*arguments, **options):
        for error in late:
            raise error
        return get(*arguments, **options)

    monkeypatch.setattr(epoch.output_queue, "get", get_late)
    assert [len(output.pixels) for (output,) in epoch] == [3]
    epoch.close()


def epoch_threads() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if isinstance(thread, softshard.pipeline.views.loader._ViewEpoch)
    ]


def test_leaving_early_keeps_threads_and_memory_flat(digits) -> None:
    loader, rows = make(digits, batch_size=64), np.tile(np.arange(len(digits)), 50)

    def leave_early(times: int) -> int:
        for _ in range(times):
            for _ in loader.render(rows, 0):
                break
        gc.collect()
        return psutil.Process().memory_info().rss

    before = leave_early(5)
    after = leave_early(20)
    assert not epoch_threads()
    assert after - before < 8 << 20


def test_leaving_early_leaves_the_rest_alone(digits, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(side_effect=softshard.pipeline.views.loader.render, signatures=[()])
    monkeypatch.setattr(softshard.pipeline.views.loader, "render", render)
    for _ in make(digits, batch_size=2).render(np.arange(len(digits)), 0):
        break
    parts = 2  # of each batch
    assert render.call_count <= 6 * parts, "one was taken, three wait, one is ready, one is about to be"


def test_an_exception_in_the_consumer_ends_the_epoch(digits) -> None:
    def consume(batches: Iterator) -> None:
        for _ in batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume(make(digits).render(np.arange(len(digits)), 0))
    deadline = time.monotonic() + 10
    while epoch_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not epoch_threads()


def test_other_compiled_code_survives_a_loader(digits) -> None:
    """FFCV's loader changes numba's type of byte arrays for the whole process."""

    @numba.njit
    def first(values):
        return values[0]

    values = np.arange(3, dtype=np.uint8)
    assert first(values) == 0
    pixels(make(digits), np.arange(2), 0)

    @numba.njit
    def again(values):
        return first(values)

    assert again(values) == 0


def test_numbas_own_threading_layer_does_no_harm(digits, expected, pairs) -> None:
    """It aborts on concurrent use; two loaders at once do not touch it."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    command = [sys.executable, "-W", "error", "-c", TWO_AT_ONCE, str(digits.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 2 * [hashlib.sha256(expected.contiguous().numpy().tobytes()).hexdigest()]


# Caches


def test_the_process_cache_gives_the_same(photos: Beton, digits: Beton, expected, pairs) -> None:
    order = np.random.default_rng(2).permutation(len(pairs[0]))
    loader = ViewLoader(digits, RECIPE, SIZE, 16, 2, CPU, os_cache=False, batches_ahead=1)
    for _ in range(2):
        assert torch.equal(pixels(loader, pairs[0][order], pairs[1][order]), expected[order])


def test_the_process_cache_reads_several_pages(photo_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(softshard.pipeline.images.beton, "MIN_PAGE_BYTES", 1 << 12)
    pack(recipe_for(photo_folder, tmp_path / "pages.beton", max_side=120))
    beton = open_beton(tmp_path / "pages.beton")
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(beton)), 3))
    by_system = pixels(make(beton, 2), rows, 1)
    cached = pixels(ViewLoader(beton, RECIPE, SIZE, 2, 2, CPU, os_cache=False), rows, 1)
    assert torch.equal(cached, by_system)


def test_leaving_the_process_cache_early_ends_its_readers(digits: Beton) -> None:
    loader = ViewLoader(digits, RECIPE, SIZE, 16, 2, CPU, os_cache=False)
    before = threading.active_count()
    for _ in range(20):
        for _ in loader.render(np.arange(len(digits)), 0):
            break
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_mixing_wants_the_system_cache(digits: Beton) -> None:
    with pytest.raises(RecipeError, match="expected os_cache: true for mixup and cutmix, found false"):
        ViewLoader(digits, RICH, SIZE, 16, 2, CPU, os_cache=False)


def test_a_damaged_partner_is_named(copy: Path) -> None:
    views = ViewRecipe(seed=1, count=1, mixup=MixRecipe())
    beton = open_beton(copy)
    partners = find_partners(
        view_parameters(views), beton.keys, np.argsort(beton.keys), np.zeros((len(beton), 1), np.int64)
    )[:, 0]
    row = next(row for row in range(len(beton)) if partners[row] != row)
    with copy.open("r+b") as file:
        file.seek(int(beton.offsets[partners[row]]) + 100)
        file.write(b"damaged")
    with pytest.raises(DataError, match=rf"found 1 that have changed, such as {beton.manifest.keys[partners[row]]};"):
        pixels(make(open_beton(copy), views=views), np.array([row]), 0)


def test_views_of_other_rows_are_refused(digits: Beton) -> None:
    with pytest.raises(AssertionError, match="views of 3 rows for 2"):
        next(make(digits).render(np.arange(2), np.zeros((3, 4), np.int64)))


@pytest.mark.gpu
@pytest.mark.parametrize("views", [RECIPE, RICH])
def test_batches_on_an_accelerator_are_those_of_the_cpu(digits, pairs, views: ViewRecipe) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    loaders = [ViewLoader(digits, views, SIZE, 16, 2, where, batches_ahead=1) for where in (CPU, device)]
    held = []  # what is on the device stays as it is, whatever the decoder does with its own memory
    for cpu, other in zip(*(loader.render(*pairs) for loader in loaders), strict=True):
        assert other.images.device.type == other.labels.device.type == device.type
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        held.append((cpu.images.clone(), cpu.labels, other.images, other.labels))
    for images, labels, other_images, other_labels in held:
        assert torch.equal(images, other_images.cpu())
        assert torch.equal(labels, other_labels.cpu())


@pytest.mark.parametrize("left_early", [True, False])
def test_memory_is_given_back_when_its_copy_is_done(digits, monkeypatch, left_early: bool) -> None:
    """Whichever way the loop ends. Tensors of the device `meta` stand for those of a GPU."""
    event = Mock()
    monkeypatch.setattr(softshard.pipeline.views.loader.torch, "Event", event)
    batches = ViewLoader(digits, RECIPE, SIZE, 16, 2, torch.device("meta")).render(np.arange(32), 0)
    next(batches)
    assert not event().synchronize.called, "the device is waited for when the next batch is asked for, not before"
    if left_early:
        batches.close()
    else:
        next(batches)
    event().record.assert_called()
    assert event().synchronize.call_count == 1
    batches.close()


def test_the_decoding_thread_uses_its_process_device(digits, monkeypatch) -> None:
    """Threads begin with the first GPU: those of another process would hold memory there."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda index: chosen.append((threading.current_thread(), index))
    )
    pixels(make(digits), np.arange(2), 0)
    [(thread, index)] = chosen
    assert thread is not threading.main_thread()
    assert index == 3
