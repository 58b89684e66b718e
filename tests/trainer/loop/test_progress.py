"""What a run shows: TensorBoard files, metrics, curves, the live line, and when it waits for images."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers.small_runs import Crash, acting, crash, metrics, train_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import softshard.trainer.loop.progress
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.loop.curves import plot_curves
from softshard.trainer.loop.progress import Clock
from softshard.trainer.loop.run_folder import CURVES, LAST, METRICS
from softshard.trainer.loop.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
TENSORBOARD = ("logging", "{trackers: [tensorboard], updates: 3}")


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (update, value), as TensorBoard reads the files."""
    reader = EventAccumulator(str(run / "tensorboard" / run.name))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    """Four epochs of four updates."""
    assert train(train_recipe(inputs, TENSORBOARD))
    return inputs / "run"


def test_tensorboard_has_losses_of_updates_and_figures_of_validations(run: Path) -> None:
    found, lines = scalars(run), metrics(run)
    assert {
        f"train/{name}" for name in ("loss", "hard_loss", "soft_loss", "lr", "images_per_second", "data_wait")
    } <= set(found)
    # after every third update of an epoch, and after its last
    assert [update for update, _ in found["train/loss"]] == [3, 4, 7, 8, 11, 12, 15, 16]
    for number, line in enumerate(lines):
        (_, of_three), (_, of_one) = found["train/loss"][2 * number : 2 * number + 2]
        assert (3 * of_three + of_one) / 4 == pytest.approx(line["loss"], rel=1e-5)
    for name in ("top1", "ema_top1", "validation_loss", "agreement"):
        assert found[f"validation/{name}"] == [
            (4 * line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines
        ]
    assert [update for update, _ in found["validation/folded_top1"]] == [16]


def test_the_recipe_is_in_it(run: Path) -> None:
    [file] = (run / "tensorboard").rglob("hparams.yml")
    assert "optimizer.lr: 0.001" in file.read_text()


@pytest.mark.parametrize("crashes", [6, 7, 9])
def test_a_resumed_run_shows_each_update_once(inputs: Path, run: Path, tmp_path: Path, crashes: int) -> None:
    """Updates after the last checkpoint, that of an epoch's end, are done again: TensorBoard forgets what it saw of
    them, and keeps everything else."""
    recipe = train_recipe(inputs, TENSORBOARD, ("logging.updates", "1"), ("output", str(tmp_path / "run")))
    with acting(crashes, crash), pytest.raises(Crash):
        train(recipe)
    last = (crashes - 1) // 4 * 4
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["progress"]["epoch"] == last / 4
    before = scalars(tmp_path / "run")
    assert [update for update, _ in before["train/loss"]] == list(range(1, crashes))
    assert train(recipe)
    assert metrics(tmp_path / "run") == metrics(run)
    after = scalars(tmp_path / "run")
    assert [update for update, _ in after["train/loss"]] == list(range(1, 17))
    assert after["train/loss"][: crashes - 1] == before["train/loss"]
    assert after["validation/top1"] == scalars(run)["validation/top1"]


def test_metrics_are_json_lines(run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] < 1 for line in lines)


def test_curves_are_a_picture_with_something_on_it(run: Path) -> None:
    picture = matplotlib.image.imread(run / CURVES)
    assert picture.shape[:2] == (900, 1000)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 4)[::7]}) > 20


def test_curves_of_hard_labels_leave_out_what_there_is_not(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "loss": 2.0, "hard_loss": 2.0, "soft_loss": 0.0, "lr": 0.1, "images_per_second": 9.0}]
    plot_curves(lines, "x", tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[:2] == (600, 1000)
    without = [{key: value for key, value in line.items() if key != "soft_loss"} for line in lines]
    plot_curves(without, "x", tmp_path / "without.png")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_the_live_line_and_each_validation(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(train_recipe(inputs, ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))))
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(
        all(word in line for word in ("epoch 2/2", "8/8", "loss=", "hard=", "soft=", "img/s=", "wait=", "<"))
        for line in shown
    )
    said = [line for line in shown if line.startswith("epoch ")]
    assert said[0].startswith("epoch 1; weights: top-1 ")
    assert "; folded: top-1 " in said[1]


@pytest.mark.parametrize("waits", [True, False])
def test_waiting_for_images_is_said_once_with_what_to_try(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr(Clock, "figures", lambda *_: {"images_per_second": 1.0, "data_wait": 0.34 if waits else 0.1})
    assert train(train_recipe(inputs, ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))))
    message = (
        "epoch 1: 34% of the time went into waiting for images; raise data.workers (2), pack with a smaller max_side, "
        "or label views with dct_scaling: true\n"
    )
    assert capsys.readouterr().err.count(message) == waits


def test_the_loader_counts_the_time_it_waits(inputs: Path) -> None:
    beton = open_beton(inputs / "train.beton")
    loader = ViewLoader(beton, None, 32, 8, 1, torch.device("cpu"))
    started = time.perf_counter()
    for _ in loader.render(np.arange(70), CENTER):
        time.sleep(0.01)  # what the loop itself takes is not counted
    seconds = time.perf_counter() - started
    assert 0 < loader.waited < seconds - 0.09


def test_a_clock_counts_from_its_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now, loader = 10.0, cast(Any, SimpleNamespace(waited=5.0))
    monkeypatch.setattr(softshard.trainer.loop.progress.time, "perf_counter", lambda: now)
    clock = Clock(loader)
    clock.count(100)
    now = 12.0
    assert clock.figures() == {"images_per_second": 50.0, "data_wait": 0.0}
    assert clock.read() == {"images_per_second": 50.0, "data_wait": 0.0}
    now, loader.waited = 16.0, 6.0
    assert clock.read() == {"images_per_second": 0.0, "data_wait": 0.25}
