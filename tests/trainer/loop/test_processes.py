"""Several processes: the same global batches, the same end, checkpoints and signals of all at once."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_runs import (
    TRAIN,
    acting,
    assert_same_run,
    launch,
    metrics,
    saved_progress,
    train_and_crash,
    train_recipe,
    weights,
    write_recipe,
)
from helpers.workers import STOPPED, finish, start, training

import softshard.trainer.loop.checkpointer
from softshard.pipeline.runtime.launch import CollectiveFlags
from softshard.trainer.data.training_set import open_training_set, rank_slice
from softshard.trainer.loop.run_folder import WEIGHTS, save_checkpoint
from softshard.trainer.loop.train import train
from softshard.trainer.loop.train_state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")
# batch norm's statistics are those of a process's part of a batch: only without them two processes equal one
NO_BATCH_NORM = ("student", "{model: test_convnext, num_classes: 10}")


@pytest.fixture
def other_run(inputs: Path) -> Iterator[Path]:
    path = inputs / "other"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def signaled_in_the_second_process() -> Iterator[None]:
    """In the sixth update of the run. The first process is slow to save, and gets signals meanwhile, as launchers and
    batch systems repeat them; the second one must not leave before."""
    if os.environ["RANK"] == "1":
        with acting(6, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            yield
        assert saved_progress(Path(os.environ["RUN"])) == (1, 3)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(softshard.trainer.loop.checkpointer, "save_checkpoint", save_slowly)
            yield


def save_slowly(folder: Path, state: dict[str, Any]) -> None:
    if state["progress"]["step"] == 3:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    save_checkpoint(folder, state)


def test_they_train_on_the_same_global_batches(inputs: Path, other_run: Path) -> None:
    recipe = write_recipe(inputs, "launched", TRAIN)
    done = launch("softshard.trainer", "train", "--config", str(recipe), "--output", str(other_run))
    assert done.returncode == 0, done.stderr
    assert "train: 2 processes on cpu" in done.stdout
    assert "Grad strides" not in done.stderr
    assert done.stderr.count("student.expand: convolutions with branches: ") == 1
    assert done.stderr.count("train: 3 views for 4 epochs: each is seen 1 or 2 times\n") == 1
    assert len(metrics(other_run)) == 4
    assert (other_run / WEIGHTS).exists()


def test_a_signal_to_one_of_them_stops_both_after_the_same_update(
    inputs: Path, other_run: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(inputs, "stopped", TRAIN)
    assert finish(start(training(recipe, ("output", str(tmp_path / "whole"))), 2)) == [0, 0]
    work = training(recipe, ("output", str(other_run)))
    signaled = training(recipe, ("output", str(other_run)), within=signaled_in_the_second_process)
    assert finish(start(signaled, 2, RUN=other_run)) == [STOPPED, STOPPED]
    assert saved_progress(other_run) == (1, 3)  # the wish of one update is known after the next one
    assert finish(start(work, 2)) == [0, 0]
    assert_same_run(tmp_path / "whole", other_run)


def test_a_checkpoint_that_is_due_is_written_once(
    inputs: Path, other_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process asks for is granted one update later. A checkpoint is due after three."""

    class Late(CollectiveFlags):
        before: tuple[bool, ...] = (False, False)

        def __call__(self, *wishes: bool, now: bool = False) -> list[bool]:
            granted = [one or (now and two) for one, two in zip(self.before, wishes, strict=True)]
            self.before = (False, False) if now else wishes
            return granted

    minutes, saved = 0.0, []
    monkeypatch.setattr(softshard.trainer.loop.checkpointer, "CollectiveFlags", Late)
    monkeypatch.setattr(softshard.trainer.loop.checkpointer.time, "monotonic", lambda: 60 * minutes)

    def save(folder: Path, state: dict[str, Any]) -> None:
        saved.append(state["progress"]["step"])
        save_checkpoint(folder, state)

    monkeypatch.setattr(softshard.trainer.loop.checkpointer, "save_checkpoint", save)
    learn = TrainState.learn

    def learn_for_a_minute(self: TrainState, *arguments: Any) -> Any:
        nonlocal minutes
        minutes += 1
        return learn(self, *arguments)

    monkeypatch.setattr(TrainState, "learn", learn_for_a_minute)
    changes = ("schedule", "{epochs: 1}"), ("batch_size", "5"), ("checkpoint_minutes", "2.5")
    assert train(train_recipe(inputs, *changes, ("output", str(other_run))))
    assert saved == [4, 8, 12, 14, 0]  # before and after the validation, too


def test_one_and_two_processes_learn_the_same(inputs: Path, tmp_path: Path) -> None:
    """Without batch norm, up to the rounding of sums; also when a run resumes with another number of processes,
    and when batches are accumulated."""
    changes = NO_BATCH_NORM, ("optimizer", "{name: sgd, lr: 0.05}"), ("schedule.epochs", "2")
    recipe = write_recipe(inputs, "elastic", TRAIN)
    ends = {}
    for name, processes, extra in (
        ("one", 1, []),
        ("two", 2, []),
        ("parts", 2, [("accumulation", "4")]),
        ("elastic", 2, []),
    ):
        output = ("output", str(tmp_path / name))
        if name == "elastic":
            train_and_crash(train_recipe(inputs, *changes, output), 6)
        assert finish(start(training(recipe, *changes, *extra, output), processes)) == [0] * processes
        ends[name] = weights(tmp_path / name)
    for name in ("two", "parts", "elastic"):
        torch.testing.assert_close(ends[name], ends["one"], rtol=1e-4, atol=1e-5)
        lines = zip(metrics(tmp_path / name), metrics(tmp_path / "one"), strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in lines)


def test_the_slices_of_all_ranks_make_up_the_batch(inputs: Path) -> None:
    order = open_training_set(train_recipe(inputs)).order(seed=3, epoch=1)
    assert len(order) == 70
    whole = rank_slice(order, 16, 0, 1)
    halves = [rank_slice(order, 16, rank, 2) for rank in range(2)]
    assert (np.concatenate(halves, axis=1) == whole).all()
    assert (whole.reshape(-1) == order[:64]).all()
