"""Training that is killed at any moment resumes to the same end."""

import random
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from helpers.small_runs import TRAIN, assert_same_run, label_recipe, make_inputs, saved_progress, write_recipe
from helpers.workers import finish, kill, start, training

from softshard.pipeline.labels.label import label
from softshard.trainer.loop.run_folder import LAST, WEIGHTS

EPOCHS, STEPS, MANY = 4, 8, 10


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It writes a checkpoint after every update; most of its time passes within epochs."""
    folder = make_inputs(tmp_path_factory.mktemp("training kills"))
    assert label(label_recipe(folder))
    text = TRAIN.replace("epochs: 4", f"epochs: {EPOCHS}").replace("batch_size: 16", "batch_size: 8")
    text += "checkpoint_minutes: 1.0e-9\nevaluation: {{epochs: 3, agreement: 0}}\n"
    return write_recipe(folder, "train", text)


@pytest.mark.parametrize(
    ("processes", "kills"),
    [(1, 3), (2, 2), *(pytest.param(count, MANY, marks=pytest.mark.slow) for count in (1, 2))],
)
def test_kills_at_random_moments_end_in_the_same_weights(
    recipe: Path, tmp_path: Path, processes: int, kills: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    workers = start(training(recipe, ("output", str(whole))), processes)
    until_saved(whole, workers)
    began = time.monotonic()
    assert finish(workers) == [0] * processes
    seconds = time.monotonic() - began
    moments, places = random.Random(processes), []
    for number in range(kills):
        workers = start(training(recipe, ("output", str(run))), processes)
        if number % 5 < 4:  # every fifth kill may come before the run has begun
            until_saved(run, workers)
        time.sleep(moments.uniform(0, 0.3) * seconds)
        assert all(worker.exitcode in (None, 0) for worker in workers)  # none has died by itself
        kill(workers)
        places.append(_updates(run))
        if (run / WEIGHTS).exists():  # it was done before it could be killed
            assert_same_run(whole, run)
            shutil.rmtree(run)
    assert finish(start(training(recipe, ("output", str(run))), processes)) == [0] * processes
    assert_same_run(whole, run)
    assert any(places), "no kill came after a checkpoint"
    if kills == MANY:
        assert any(place % STEPS for place in places), f"no kill came within an epoch: {places}"


def until_saved(run: Path, workers: list[ForkServerProcess]) -> None:
    """Wait for a new checkpoint, or for the end."""
    before, deadline = _saved(run), time.monotonic() + 120
    while _saved(run) == before and all(worker.is_alive() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _saved(run: Path) -> int:
    try:
        return (run / LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _updates(run: Path) -> int:
    if not (run / LAST).exists():
        return 0
    epoch, step = saved_progress(run)
    return epoch * STEPS + step
