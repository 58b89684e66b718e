"""Training runs: what they leave behind, what ends them early, and that they resume exactly where they stopped."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.small_runs import (
    TRAIN,
    Crash,
    acting,
    assert_same_run,
    metrics,
    saved_progress,
    train_and_crash,
    train_recipe,
    weights,
    write_recipe,
)

import softshard.trainer.__main__
import softshard.trainer.loop.train
from softshard.pipeline.runtime.launch import STOPPING
from softshard.trainer.data.training_set import open_training_set
from softshard.trainer.evaluate import evaluate
from softshard.trainer.loop.run_folder import BEST, CURVES, LAST, LOCK, METRICS, PREVIOUS, WEIGHTS
from softshard.trainer.loop.train import train
from softshard.trainer.loop.validation import Validation
from softshard.trainer.student import make_student

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    """A run of four epochs of four updates without interruption."""
    assert train(train_recipe(inputs))
    return inputs / "run"


@pytest.fixture
def other_run(inputs: Path) -> Iterator[Path]:
    path = inputs / "other"
    yield path
    shutil.rmtree(path, ignore_errors=True)


# Every update is followed by a save, and every validation: five saves an epoch.
@pytest.mark.parametrize("saves", [2, 4, 5, 7])
def test_a_crash_in_or_after_an_epoch_changes_nothing(inputs: Path, run: Path, other_run: Path, saves: int) -> None:
    recipe = train_recipe(inputs, ("output", str(other_run)))
    train_and_crash(recipe, saves)
    assert not (other_run / WEIGHTS).exists()
    progress = torch.load(other_run / LAST, weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == divmod(saves, 5)
    assert train(recipe)
    assert_same_run(run, other_run)


def test_two_updates_a_crash_and_two_more_equal_four(inputs: Path, tmp_path: Path) -> None:
    """With dropout, accumulation, clipping, a temperature that falls, and an optimizer with a state."""
    changes = [
        *(("schedule", "{name: linear, epochs: 1}"), ("accumulation", "2"), ("optimizer.clip_grad", "1.0")),
        *(("loss.final_temperature", "1.0"), ("student.model", "ghostnet_050"), ("student.expand", "null")),
    ]
    one, two = (train_recipe(inputs, *changes, ("output", str(tmp_path / name))) for name in ("one", "two"))
    assert make_student(one).network.drop_rate == 0.2
    assert train(one)
    train_and_crash(two, 2)
    assert train(two)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_run_leaves_its_folder_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "classes.txt", METRICS, CURVES, LAST, PREVIOUS, BEST, WEIGHTS, LOCK}


def test_training_changes_the_student_and_lowers_the_loss(inputs: Path, run: Path) -> None:
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["view"] for line in lines] == [0, 1, 2, 0]
    assert lines[3]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(0.1 * line["hard_loss"] + 0.9 * line["soft_loss"], rel=1e-5)
    start = make_student(train_recipe(inputs)).network.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights(run).items())


def test_validation_is_of_the_weights_their_average_and_the_folded_result(inputs: Path, run: Path) -> None:
    lines = metrics(run)
    kinds = ("top1", "top5", "validation_loss", "agreement")
    assert all({*kinds, *(f"ema_{kind}" for kind in kinds)} <= line.keys() for line in lines)
    assert [line.keys() >= {f"folded_{kind}" for kind in kinds} for line in lines] == [False, False, False, True]
    scores = evaluate(train_recipe(inputs), run / WEIGHTS).scores
    last = lines[-1]
    for prefix in ("ema_", "folded_"):
        assert (last[f"{prefix}top1"], last[f"{prefix}top5"]) == (scores.top1, scores.top5)
        assert last[f"{prefix}validation_loss"] == pytest.approx(scores.loss, rel=1e-4)


def test_the_best_weights_are_those_of_the_best_validation(inputs: Path, run: Path) -> None:
    best = max(line["ema_top1"] for line in metrics(run))
    assert evaluate(train_recipe(inputs), run / BEST).scores.top1 == best


def test_validation_may_be_rarer(inputs: Path, other_run: Path) -> None:
    changes = ("evaluation", "{epochs: 3, agreement: 0}"), ("ema", "null"), ("output", str(other_run))
    assert train(train_recipe(inputs, *changes))
    lines = metrics(other_run)
    assert ["top1" in line for line in lines] == [False, False, True, True]
    assert not any("agreement" in line or "ema_top1" in line for line in lines)


def test_a_finished_run_is_left_alone(inputs: Path, run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert train(train_recipe(inputs))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_update_and_the_run_goes_on_to_the_same_end(
    inputs: Path, run: Path, other_run: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(inputs, "signaled", TRAIN)
    words = ["train", "--config", str(recipe), "--output", str(other_run)]
    with acting(6, lambda _: os.kill(os.getpid(), number)):
        assert softshard.trainer.__main__.main(words) == 130
    shown = capfd.readouterr()
    assert f"{other_run}: stopped; run the same command again to resume with the next batch\n" in shown.out
    assert shown.err.count(f"{signal.Signals(number).name}: {STOPPING}\n") == 1
    assert saved_progress(other_run) == (1, 2)
    assert not (other_run / WEIGHTS).exists()
    assert softshard.trainer.__main__.main(words) == 0
    assert_same_run(run, other_run)


def test_a_signal_in_a_validation_lets_it_finish(inputs: Path, run: Path, other_run: Path) -> None:
    recipe = train_recipe(inputs, ("output", str(other_run)))
    figures, done = Validation.figures, 0

    def interrupted(self: Validation, *arguments: Any, **options: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return figures(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "figures", interrupted)
        assert not train(recipe)
    assert (done, saved_progress(other_run)) == (1, (1, 1))
    assert train(recipe)
    assert_same_run(run, other_run)


def test_the_order_depends_on_seed_epoch_and_keys_alone(inputs: Path) -> None:
    training_set = open_training_set(train_recipe(inputs))
    order = training_set.order(3, 0)
    assert sorted(order) == list(range(70))
    assert (training_set.order(3, 0) == order).all()
    assert (training_set.order(3, 1) != order).any()
    assert (training_set.order(4, 0) != order).any()


def test_hard_labels_alone_train_a_plain_network(inputs: Path, other_run: Path) -> None:
    changes = ("data.labels", "null"), ("views", "{seed: 1, count: 2}"), ("student.expand", "null"), ("ema", "null")
    assert train(train_recipe(inputs, *changes, ("output", str(other_run))))
    result = evaluate(train_recipe(inputs, *changes, ("output", str(other_run))), other_run / WEIGHTS)
    assert result.images == 20
    assert all(line["soft_loss"] == 0 and line["loss"] == line["hard_loss"] for line in metrics(other_run))
    assert not any("agreement" in line or "folded_top1" in line for line in metrics(other_run))


def test_soft_labels_alone(inputs: Path, other_run: Path) -> None:
    assert train(train_recipe(inputs, ("loss.alpha", "1.0"), ("output", str(other_run))))
    assert all(line["hard_loss"] == 0 and line["loss"] == line["soft_loss"] for line in metrics(other_run))


def test_a_crash_while_the_best_weights_are_written_leaves_no_part_of_them(
    inputs: Path, other_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def crash(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", crash)
        with pytest.raises(Crash):
            train(train_recipe(inputs, ("output", str(other_run))))
    assert not (other_run / BEST).exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_an_accelerator_trains_and_goes_on(inputs: Path, tmp_path: Path, precision: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    changes = ("precision", precision), ("optimizer.clip_grad", "1.0"), ("output", str(tmp_path / "run"))
    try:
        train_and_crash(train_recipe(inputs, *changes), 6)
        assert train(train_recipe(inputs, *changes))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]
