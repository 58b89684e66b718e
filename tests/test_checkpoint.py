"""Run folders: which recipe may use them, and checkpoints that are damaged."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import Crash, assert_same, label_recipe, make_inputs, train_and_crash, train_recipe, weights
from small_teachers import Evil

from pipeline.errors import DataError, FormatError, RecipeError
from pipeline.label import label
from trainer.checkpoint import LAST, PREVIOUS, RECIPE, WEIGHTS, load_checkpoint, save_checkpoint
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("checkpoint"))
    assert label(label_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    assert train(train_recipe(inputs))
    return inputs / "run"


@pytest.fixture(scope="module")
def crashed(inputs: Path) -> Path:
    """A run that ended in its second epoch."""
    train_and_crash(train_recipe(inputs, ("output", str(inputs / "crashed"))), 6)
    return inputs / "crashed"


@pytest.fixture
def copy(crashed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crashed, tmp_path / "run"))


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


class TestOtherRecipes:
    def test_a_run_of_another_recipe_is_refused_with_all_differences(self, inputs: Path, run: Path) -> None:
        message = (
            rf"^{run}: expected a run of this recipe, found one of another: loss.alpha: expected 0.5, found 0.9; "
            r"optimizer.lr: expected 0.002, found 0.001; name another output$"
        )
        with pytest.raises(DataError, match=message):
            train(train_recipe(inputs, ("optimizer.lr", "0.002"), ("loss.alpha", "0.5")))

    def test_what_does_not_change_the_student_is_no_other_recipe(self, inputs: Path, run: Path) -> None:
        changes = ("data.workers", "1"), ("accumulation", "2"), ("watch.updates", "7"), ("checkpoint_minutes", "1")
        assert train(train_recipe(inputs, *changes, ("evaluation.epochs", "2")))

    def test_before_the_first_checkpoint_a_recipe_may_be_corrected(self, inputs: Path, tmp_path: Path) -> None:
        output = ("output", str(tmp_path / "run"))
        with pytest.raises(RecipeError, match=r"student.model: no timm model is called 'mobilnetv2_100'"):
            train(train_recipe(inputs, ("student.model", "mobilnetv2_100"), output))
        assert (tmp_path / "run" / RECIPE).exists()
        train_and_crash(train_recipe(inputs, output), 1)
        assert "test_efficientnet" in (tmp_path / "run" / RECIPE).read_text()


class TestDamage:
    @pytest.mark.parametrize("damage", [halved, flipped, lambda data: b"", lambda data: b"x" * 100])
    def test_the_checkpoint_before_takes_over_and_is_named(
        self, inputs: Path, run: Path, copy: Path, damage, caplog: pytest.LogCaptureFixture
    ) -> None:
        (copy / LAST).write_bytes(damage((copy / LAST).read_bytes()))
        assert train(train_recipe(inputs, ("output", str(copy))))
        said = [record.getMessage() for record in caplog.records if record.name == "trainer.checkpoint"]
        assert len(said) == 1
        assert said[0].startswith(f"{copy / LAST}: expected a checkpoint of tensors and plain values, found: ")
        assert said[0].endswith(f"; going on from {copy / PREVIOUS}")
        assert_same(weights(copy), weights(run))

    def test_a_kill_between_the_two_renames_loses_nothing(self, inputs: Path, run: Path, copy: Path) -> None:
        (copy / LAST).unlink()
        assert train(train_recipe(inputs, ("output", str(copy))))
        assert_same(weights(copy), weights(run))

    def test_two_damaged_checkpoints_are_an_error(self, inputs: Path, copy: Path) -> None:
        for name in (LAST, PREVIOUS):
            (copy / name).write_bytes(b"")
        message = (
            rf"^{copy}/last.pt: expected a checkpoint of tensors and plain values, found: File is not a zip file; "
            rf"{copy}/previous.pt: expected a checkpoint of tensors and plain values, found: File is not a zip file; "
            r"delete what is there to start this run again, or name another output$"
        )
        with pytest.raises(FormatError, match=message):
            train(train_recipe(inputs, ("output", str(copy))))

    def test_pickled_code_is_not_run(self, copy: Path) -> None:
        torch.save({"progress": Evil(copy / "ran")}, copy / LAST)
        (copy / PREVIOUS).unlink()
        with pytest.raises(FormatError, match=r"last.pt: expected a checkpoint of tensors and plain values, found"):
            load_checkpoint(copy)
        assert not (copy / "ran").exists()

    def test_no_flipped_bit_passes(self, tmp_path: Path) -> None:
        state = {"weights": torch.randn(100, 50), "metrics": [{"epoch": 1, "loss": 0.5}] * 20}
        save_checkpoint(tmp_path, state)
        whole, draw = (tmp_path / LAST).read_bytes(), random.Random(0)
        refused = 0
        for _ in range(300):
            data, place = bytearray(whole), draw.randrange(len(whole))
            data[place] ^= 1 << draw.randrange(8)
            (tmp_path / LAST).write_bytes(data)
            try:
                found = load_checkpoint(tmp_path)
            except FormatError:
                refused += 1
            else:  # a bit that carries nothing, such as a date
                assert_same(found, state)
        assert refused > 250


def test_saving_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    for number in range(3):
        save_checkpoint(tmp_path, {"number": number})
    assert load_checkpoint(tmp_path) == {"number": 2}
    assert torch.load(tmp_path / PREVIOUS, weights_only=True) == {"number": 1}
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_a_crash_in_saving_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        save_checkpoint(tmp_path, {"number": number})

    def crash(state, path) -> None:
        path.write_bytes(b"half")
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, {"number": 2})
    assert load_checkpoint(tmp_path) == {"number": 1}
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_weights_are_written_at_the_end_alone(crashed: Path, run: Path) -> None:
    assert not (crashed / WEIGHTS).exists()
    assert (run / WEIGHTS).exists()
