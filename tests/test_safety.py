"""What cannot work is refused early, and what goes wrong says what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_runs import label_recipe, make_inputs, train_recipe
from small_teachers import Evil

import trainer.learner
from pipeline.errors import DataError, FormatError, RecipeError, SoftshardError
from pipeline.label import label
from trainer.checkpoint import LAST
from trainer.data import open_training_set, share
from trainer.evaluate import evaluate
from trainer.losses import Losses
from trainer.safety import NOT_FINITE, check_batch, check_same_start
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("safety"))
    assert label(label_recipe(folder))
    return folder


REFUSED: list[tuple[list[tuple[str, str]], type[SoftshardError], str]] = [
    (
        [("student.num_classes", "12")],
        DataError,
        "{folder}/train.beton: expected 12 classes, as the student has, found 10; correct one",
    ),
    ([("student.model", "mobilnetv2_100")], RecipeError, "student.model: no timm model is called 'mobilnetv2_100'"),
    (
        [("batch_size", "71")],
        DataError,
        "{folder}/train.beton: expected at least batch_size = 71 rows to train on, found 70; lower batch_size",
    ),
    ([("data.labels", "none.zarr")], DataError, "none.zarr: expected a store"),
    ([("data.validation", "none.beton")], DataError, "none.beton: expected a packed image file, found none"),
    (
        [("accumulation", "3")],
        RecipeError,
        "batch_size: expected a multiple of 3, the number of processes (1) times accumulation (3), found 16; "
        "correct one",
    ),
    (
        [("accumulation", "16")],
        RecipeError,
        "batch_size: expected at least 2 images in each part, for batch norm's statistics, found 1 of 16; raise "
        "batch_size, or lower accumulation (16) or the number of processes (1)",
    ),
    (
        [("precision", "fp16")],
        RecipeError,
        "precision: expected float32 or bf16 on a CPU, found fp16; choose one of them",
    ),
    (
        [("sync_batch_norm", "true")],
        RecipeError,
        "sync_batch_norm: expected false on a CPU, which torch cannot do it on, found true",
    ),
    (
        [("optimizer.options", "{momentun: 0.9}")],
        RecipeError,
        "optimizer.options: expected arguments of adamw, found momentun: ",
    ),
    (
        [("watch.trackers", "[tensorbord]")],
        RecipeError,
        "watch.trackers: expected trackers of Accelerate (",
    ),
    (
        [("watch.trackers", "[wandb]")],
        RecipeError,
        "watch.trackers: expected wandb to be installed, found that it is not; pip install it",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_and_leaves_no_checkpoint(
    inputs: Path, tmp_path: Path, changes: list[tuple[str, str]], error: type[SoftshardError], message: str
) -> None:
    with pytest.raises(error) as found:
        train(train_recipe(inputs, *changes, ("output", str(tmp_path / "run"))))
    assert str(found.value).startswith(message.format(folder=inputs))
    assert not (tmp_path / "run" / LAST).exists()


def test_the_batch_is_divided_among_processes_and_accumulation(inputs: Path) -> None:
    check_batch(train_recipe(inputs, ("accumulation", "2")), 4)
    with pytest.raises(
        RecipeError, match=r"expected a multiple of 6, the number of processes \(3\) times accumulation"
    ):
        check_batch(train_recipe(inputs, ("accumulation", "2")), 3)


def test_single_images_are_enough_without_batch_norm(inputs: Path, tmp_path: Path) -> None:
    changes = ("student", "{model: test_convnext, num_classes: 10}"), ("accumulation", "16"), ("schedule.epochs", "2")
    assert train(train_recipe(inputs, *changes, ("output", str(tmp_path / "run"))))


def test_run_folders_that_are_not_shared_are_noticed(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    check_same_start(train_recipe(inputs), accelerator, 6)
    monkeypatch.setattr(accelerator, "gather", lambda tensor: torch.tensor([6, 0]))
    message = (
        rf"^{inputs}/run: expected the same checkpoint in all processes, found updates 6, 0; put output on a disk that "
        r"all machines share$"
    )
    with pytest.raises(DataError, match=message):
        check_same_start(train_recipe(inputs), accelerator, 6)


def test_the_launchers_precision_must_be_the_recipes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    message = (
        r"^train: expected no --mixed_precision, because results depend on it, found bf16; set `precision: bf16` in "
        r"the recipe$"
    )
    with pytest.raises(DataError, match=message):
        train(train_recipe(inputs))


class TestNotFinite:
    @pytest.fixture
    def nan_in_update_six(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loss of the third update of the second epoch is not a number."""
        learn, count = trainer.learner.Learner.learn, 0

        def broken(self, update, batch, soft) -> Losses:
            nonlocal count
            losses = learn(self, update, batch, soft)
            count += 1
            return losses._replace(total=losses.total * torch.nan) if count == 7 else losses

        monkeypatch.setattr(trainer.learner.Learner, "learn", broken)

    def test_it_stops_the_run_and_its_keys_are_in_a_file(
        self, inputs: Path, tmp_path: Path, nan_in_update_six: None
    ) -> None:
        recipe = train_recipe(inputs, ("output", str(tmp_path / "run")), ("watch.updates", "100"))
        message = (
            rf"^{tmp_path}/run: epoch 2, step 3: expected a finite loss, found nan; the keys of the 16 images are in "
            rf"{tmp_path}/run/{NOT_FINITE}; lower optimizer.lr \(0.001\), warm up longer \(schedule.warmup_epochs 1\), "
            r"or set optimizer.clip_grad$"
        )
        with pytest.raises(DataError, match=message):
            train(recipe)
        training = open_training_set(recipe)
        rows = share(training.order(recipe.seed, 1), 16, 0, 1)[2]
        keys = (tmp_path / "run" / NOT_FINITE).read_text().splitlines()
        assert keys == [training.beton.manifest.keys[row] for row in rows]

    def test_nothing_that_follows_it_is_kept(self, inputs: Path, tmp_path: Path, nan_in_update_six: None) -> None:
        recipe = train_recipe(inputs, ("output", str(tmp_path / "run")), ("checkpoint_minutes", "1e-9"))
        with pytest.raises(DataError, match="epoch 2, step 3: expected a finite loss"):
            train(recipe)
        progress = torch.load(tmp_path / "run" / LAST, weights_only=True)["progress"]
        assert (progress["epoch"], progress["step"]) == (1, 2)
        assert np.isfinite(progress["sums"]).all()


@pytest.mark.parametrize("fails", ["gpu", "cpu"])
def test_out_of_memory_says_which_setting_to_change(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def learn(*_):
        if fails == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return torch.empty(2**56)  # what the CPU's allocator says of it

    monkeypatch.setattr(trainer.learner.Learner, "learn", learn)
    message = (
        rf"^{tmp_path}/run: expected room for 8 images of 32 pixels at once, found the memory of cpu full; raise "
        r"accumulation \(2\), which leaves the global batches as they are, or set precision: bf16, or lower batch_size "
        r"\(16\)$"
    )
    with pytest.raises(DataError, match=message):
        train(train_recipe(inputs, ("accumulation", "2"), ("output", str(tmp_path / "run"))))


def test_other_errors_are_not_taken_for_it(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(trainer.learner.Learner, "learn", learn)
    with pytest.raises(RuntimeError, match="something else"):
        train(train_recipe(inputs, ("output", str(tmp_path / "run"))))


class TestWeights:
    def test_weights_of_another_student_are_refused(self, inputs: Path, tmp_path: Path) -> None:
        assert train(train_recipe(inputs, ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))))
        recipe = train_recipe(inputs, ("student.model", "mobilenetv2_050"))
        with pytest.raises(DataError, match=r"expected the weights of this recipe's student, found others"):
            evaluate(recipe, tmp_path / "run/model.safetensors")

    def test_weights_with_pickled_code_are_refused(self, inputs: Path, tmp_path: Path) -> None:
        torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "weights.pt")
        with pytest.raises(FormatError, match=r"weights.pt: expected a .safetensors file, .* pickled code is not read"):
            evaluate(train_recipe(inputs), tmp_path / "weights.pt")
        assert not (tmp_path / "ran").exists()
