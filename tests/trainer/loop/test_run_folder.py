"""Run folders: which recipe may use them, and checkpoints that are damaged."""

import errno
import fcntl
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.small_runs import (
    Crash,
    assert_same,
    label_recipe,
    make_inputs,
    pack_folder,
    train_and_crash,
    train_recipe,
    weights,
    write_digits,
)
from helpers.small_sources import sample, write_tar
from helpers.small_teachers import Evil

from softshard.pipeline.images.pack import pack
from softshard.pipeline.labels.label import label
from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError, RecipeError
from softshard.trainer.data.training_set import open_training_set
from softshard.trainer.loop.run_folder import (
    CLASSES,
    LAST,
    PREVIOUS,
    RECIPE,
    WEIGHTS,
    load_checkpoint,
    run_lock,
    save_checkpoint,
)
from softshard.trainer.loop.train import train
from softshard.trainer.recipe import TrainRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


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
        changes = ("data.workers", "1"), ("accumulation", "2"), ("logging.updates", "7"), ("checkpoint_minutes", "1")
        assert train(train_recipe(inputs, *changes, ("evaluation.epochs", "2")))

    def test_before_the_first_checkpoint_a_recipe_may_be_corrected(self, inputs: Path, tmp_path: Path) -> None:
        output = ("output", str(tmp_path / "run"))
        with pytest.raises(RecipeError, match=r"student.model: no timm model is called 'mobilnetv2_100'"):
            train(train_recipe(inputs, ("student.model", "mobilnetv2_100"), output))
        assert (tmp_path / "run" / RECIPE).exists()
        train_and_crash(train_recipe(inputs, output), 1)
        assert "test_efficientnet" in (tmp_path / "run" / RECIPE).read_text()


class TestOtherData:
    """A run resumes with the images and labels that it began with, whatever their files are called."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        """A run of its own inputs, on hard labels alone, that ended in its second epoch."""
        train_and_crash(own_recipe(make_inputs(tmp_path)), 7)
        return tmp_path

    def test_other_images_are_refused(self, own: Path) -> None:
        before = open_training_set(own_recipe(own)).identity
        shutil.rmtree(own / "train")
        write_digits(own / "train", 3)
        pack_folder(own / "train", own / "train.beton")
        now = open_training_set(own_recipe(own)).identity
        with pytest.raises(DataError) as found:
            train(own_recipe(own))
        assert str(found.value) == (
            f"{own}/run: expected the data that this run began with, found other data under its name: images: "
            f"expected 70, found 30; digest_of_images: expected '{before['digest_of_images']}', found "
            f"'{now['digest_of_images']}'; bring it back, or name another output"
        )

    def test_a_checkpoint_of_another_version_is_refused(self, inputs: Path, copy: Path) -> None:
        state = load_checkpoint(copy)
        assert state
        save_checkpoint(copy, {"learner": state["learner"], "progress": state["progress"]})
        with pytest.raises(FormatError) as found:
            train(train_recipe(inputs, ("output", str(copy))))
        assert str(found.value) == (
            f"{copy}: expected a checkpoint of this version of softshard, found one of another; name another output"
        )

    def test_the_same_images_in_another_order_are_the_same(self, own: Path) -> None:
        before = open_training_set(own_recipe(own)).beton.keys
        names = [f"{digit}/{number}.jpg" for digit in range(10) for number in range(7)]
        write_tar(own / "again.tar", [part for name in names[::-1] for part in packed_sample(own, name)])
        source = SourceRecipe(kind="webdataset", path=str(own / "again.tar"))
        classes = own / "run" / CLASSES
        pack(PackRecipe(source=source, classes=str(classes), output=str(own / "train.beton")))
        assert (open_training_set(own_recipe(own)).beton.keys != before).any()
        assert train(own_recipe(own))

    def test_a_store_that_has_grown_changes_the_views(self, inputs: Path, copy: Path, tmp_path: Path) -> None:
        store = ("store", str(inputs / "grown.zarr"))
        assert label(label_recipe(inputs, store))
        changes = ("data.labels", store[1]), ("output", str(tmp_path / "growing"))
        train_and_crash(train_recipe(inputs, *changes), 7)
        assert label(label_recipe(inputs, store, ("views.count", "4")))
        with pytest.raises(DataError) as found:
            train(train_recipe(inputs, *changes))
        assert str(found.value) == (
            f"{tmp_path}/growing: expected the data that this run began with, found other data under its name: "
            "views.count: expected 3, found 4; bring it back, or name another output"
        )
        assert train(train_recipe(inputs, *changes, ("data.views", "3")))


def own_recipe(folder: Path) -> TrainRecipe:
    return train_recipe(folder, ("data.labels", "null"), ("views", "{count: 3, seed: 1}"))


def packed_sample(folder: Path, name: str) -> list[tuple[str, bytes]]:
    return sample(name, (folder / "train" / name).read_bytes(), int(name[0]))


class TestAlone:
    def test_a_second_run_in_the_folder_is_refused(self, inputs: Path, copy: Path) -> None:
        before = {path.name: path.read_bytes() for path in copy.iterdir()}
        with run_lock(copy, Accelerator(cpu=True)), pytest.raises(DataError) as found:
            train(train_recipe(inputs, ("output", str(copy))))
        assert str(found.value) == (
            f"{copy}: expected no other run at work in this folder, found one; wait for it, stop it, or name another "
            "output"
        )
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == before

    def test_a_disk_without_locks_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        with run_lock(tmp_path / "run", Accelerator(cpu=True)):
            [record] = caplog.records
        assert record.getMessage() == (
            f"{tmp_path}/run: this disk has no locks ([Errno 37] No locks available): see to it that no other run "
            "works here"
        )

    def test_what_a_killed_process_left_unfinished_is_removed(self, inputs: Path, copy: Path, run: Path) -> None:
        (copy / ".last.pt.123.partial").write_bytes(b"half")
        assert train(train_recipe(inputs, ("output", str(copy))))
        assert {path.name for path in copy.iterdir()} == {path.name for path in run.iterdir()}


class TestDamage:
    @pytest.mark.parametrize("damage", [halved, flipped, lambda data: b"", lambda data: b"x" * 100])
    def test_the_checkpoint_before_takes_over_and_is_named(
        self, inputs: Path, run: Path, copy: Path, damage, caplog: pytest.LogCaptureFixture
    ) -> None:
        (copy / LAST).write_bytes(damage((copy / LAST).read_bytes()))
        assert train(train_recipe(inputs, ("output", str(copy))))
        said = [record.getMessage() for record in caplog.records if record.name == "softshard.trainer.loop.run_folder"]
        assert len(said) == 1
        assert said[0].startswith(f"{copy / LAST}: expected a checkpoint of tensors and plain values, found: ")
        assert said[0].endswith(f"; resuming from {copy / PREVIOUS}")
        assert_same(weights(copy), weights(run))

    def test_it_never_replaces_the_one_before(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Though the next save is killed between its two renames."""
        (copy / LAST).write_bytes(b"damaged")
        state = load_checkpoint(copy)
        assert state
        replace = os.replace

        def kill_at_the_second(source: Path, target: Path) -> None:
            if target == copy / LAST:
                raise Crash
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill_at_the_second)
            with pytest.raises(Crash):
                save_checkpoint(copy, state)
        assert_same(load_checkpoint(copy), state)

    def test_a_kill_between_the_two_renames_loses_nothing(self, inputs: Path, run: Path, copy: Path) -> None:
        (copy / LAST).unlink()
        assert train(train_recipe(inputs, ("output", str(copy))))
        assert_same(weights(copy), weights(run))

    def test_two_damaged_checkpoints_are_an_error(self, inputs: Path, copy: Path) -> None:
        for name in (LAST, PREVIOUS):
            (copy / name).write_bytes(b"")
        message = (
            rf"^{copy}/last.pt: expected a checkpoint of tensors and plain values, found: .+; "
            rf"{copy}/previous.pt: expected a checkpoint of tensors and plain values, found: .+; "
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


def test_weights_of_a_run_that_is_done_again_replace_the_old_ones(inputs: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "run"))
    for name in (LAST, PREVIOUS):
        (again / name).unlink()
    (again / WEIGHTS).write_bytes(b"old")
    assert train(train_recipe(inputs, ("output", str(again))))
    assert_same(weights(again), weights(run))


def test_weights_are_written_at_the_end_alone(crashed: Path, run: Path) -> None:
    assert not (crashed / WEIGHTS).exists()
    assert (run / WEIGHTS).exists()
