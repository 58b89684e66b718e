import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_runs import TRAIN, label_recipe, launch, make_inputs, pack_folder, train_recipe, write_digits, write_recipe

import pipeline.probes
from pipeline.beton import open_beton
from pipeline.errors import DataError, FormatError, RecipeError
from pipeline.label import label
from trainer.checkpoint import CHECKPOINT, METRICS, WEIGHTS
from trainer.data import open_training_set, share
from trainer.evaluate import evaluate
from trainer.student import make_student
from trainer.train import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("train"))
    assert label(label_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    """A run of four epochs without interruption."""
    assert train(train_recipe(inputs))
    return inputs / "run"


@pytest.fixture
def other_run(inputs: Path) -> Iterator[Path]:
    path = inputs / "other"
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Stop(Exception):
    """Stands for a crash."""


def train_and_crash(inputs: Path, output: Path, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and crash as soon as `epochs` epochs are in the checkpoint."""
    import trainer.train

    save = trainer.train.save_checkpoint

    def save_or_stop(folder, state):
        save(folder, state)
        if len(state["metrics"]) == epochs:
            raise Stop

    recipe = train_recipe(inputs, ("output", str(output)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.train, "save_checkpoint", save_or_stop)
        with pytest.raises(Stop):
            train(recipe)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / WEIGHTS)


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_epochs_a_crash_and_two_more_equal_four(
    inputs: Path, run: Path, other_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_crash(inputs, other_run, 2, monkeypatch)
    assert not (other_run / WEIGHTS).exists()
    assert train(train_recipe(inputs, ("output", str(other_run))))
    assert_same_weights(run, other_run)
    one, two = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (run, other_run))
    for part in ("student", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


def test_training_changes_the_student_and_lowers_the_loss(inputs: Path, run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["view"] for line in lines] == [0, 1, 2, 0]
    assert lines[3]["loss"] < lines[0]["loss"]
    start = make_student(train_recipe(inputs)).network.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights(run).items())


def test_a_finished_run_is_left_alone(inputs: Path, run: Path) -> None:
    before = (run / CHECKPOINT).read_bytes()
    assert train(train_recipe(inputs))
    assert (run / CHECKPOINT).read_bytes() == before


def test_a_run_of_another_recipe_is_refused(inputs: Path, run: Path) -> None:
    with pytest.raises(DataError, match=r"optimizer.lr: expected 0.002, found 0.001; name another output"):
        train(train_recipe(inputs, ("optimizer.lr", "0.002")))


def test_the_number_of_workers_is_no_other_recipe(inputs: Path, run: Path) -> None:
    assert train(train_recipe(inputs, ("data.workers", "1")))


def test_a_checkpoint_with_pickled_code_is_refused(inputs: Path, run: Path, other_run: Path) -> None:
    shutil.copytree(run, other_run)
    torch.save({"metrics": [], "run": _Evil(other_run / "ran")}, other_run / CHECKPOINT)
    with pytest.raises(FormatError, match=r"last.pt: expected a checkpoint of tensors and plain values, found"):
        train(train_recipe(inputs, ("output", str(other_run))))
    assert not (other_run / "ran").exists()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_checkpoint_is_named(inputs: Path, run: Path, other_run: Path, damage) -> None:
    shutil.copytree(run, other_run)
    (other_run / CHECKPOINT).write_bytes(damage((run / CHECKPOINT).read_bytes()))
    with pytest.raises(FormatError, match=r"last.pt: expected a checkpoint .* delete it to start this run again"):
        train(train_recipe(inputs, ("output", str(other_run))))


def test_sigterm_ends_cleanly_and_the_run_goes_on_to_the_same_end(inputs: Path, run: Path, other_run: Path) -> None:
    recipe = write_recipe(inputs, "signalled", TRAIN)
    command = [sys.executable, "-m", "trainer", "train", "--config", str(recipe), "--output", str(other_run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (other_run / CHECKPOINT).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    if process.returncode:  # else it was faster than the signal
        assert process.returncode == 130, errors
        assert "stopped; run the same command again to go on" in out
        assert not (other_run / WEIGHTS).exists()
        assert train(train_recipe(inputs, ("output", str(other_run))))
    assert_same_weights(run, other_run)


def test_two_processes_train_on_the_same_global_batches(inputs: Path, other_run: Path) -> None:
    recipe = write_recipe(inputs, "launched", TRAIN)
    done = launch("trainer", "train", "--config", str(recipe), "--output", str(other_run))
    assert done.returncode == 0, done.stderr
    assert "train: 2 processes on cpu" in done.stdout
    assert done.stderr.count("student.expand: convolutions with branches: ") == 1
    lines = [json.loads(line) for line in (other_run / METRICS).read_text().splitlines()]
    assert len(lines) == 4
    assert (other_run / WEIGHTS).exists()


def test_without_batch_norm_two_processes_compute_the_same_gradients(inputs: Path) -> None:
    """Global batches do not depend on the number of processes: the shares of all ranks make up the batch."""
    training = open_training_set(train_recipe(inputs))
    order = training.order(seed=3, epoch=1)
    assert len(order) == 70
    whole = share(order, 16, 0, 1).reshape(-1, 16)
    halves = [share(order, 16, rank, 2).reshape(-1, 8) for rank in range(2)]
    assert (np.concatenate(halves, axis=1) == whole).all()
    assert (whole.reshape(-1) == order[:64]).all()


def test_the_order_depends_on_seed_epoch_and_keys_alone(inputs: Path) -> None:
    training = open_training_set(train_recipe(inputs))
    order = training.order(3, 0)
    assert sorted(order) == list(range(70))
    assert (training.order(3, 0) == order).all()
    assert (training.order(3, 1) != order).any()
    assert (training.order(4, 0) != order).any()


def test_labels_are_joined_by_key_not_by_position(inputs: Path) -> None:
    """A subset, packed by itself, gets the labels of its images."""
    subset = inputs / "subset"
    for digit in (3, 1):
        shutil.copytree(inputs / "train" / str(digit), subset / str(digit))
    (inputs / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    from pipeline.pack import pack
    from pipeline.recipe import PackRecipe, SourceRecipe

    source = SourceRecipe(kind="imagefolder", path=str(subset))
    pack(PackRecipe(source=source, classes=str(inputs / "classes.txt"), output=str(inputs / "subset.beton")))
    whole = open_training_set(train_recipe(inputs))
    part = open_training_set(train_recipe(inputs, ("data.train", str(inputs / "subset.beton")), ("batch_size", "2")))
    all_labels, labels = whole.labels(0), part.labels(0)
    assert all_labels is not None
    assert labels is not None
    keys = list(whole.beton.manifest.keys)
    rows = np.array([keys.index(key) for key in part.beton.manifest.keys])
    assert len(rows) == 14
    cpu = torch.device("cpu")
    one, two = all_labels.soft(rows, 2.0, cpu), labels.soft(np.arange(14), 2.0, cpu)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.probability, two.probability)


@pytest.fixture(scope="module")
def more(inputs: Path) -> Path:
    """The labelled images and ten more."""
    write_digits(inputs / "more", 8)
    shutil.copytree(inputs / "train", inputs / "more", dirs_exist_ok=True)
    pack_folder(inputs / "more", inputs / "more.beton")
    return inputs / "more.beton"


class TestJoin:
    def test_rows_without_labels_are_counted_and_named(self, inputs: Path, more: Path) -> None:
        with pytest.raises(DataError, match=r"for all 80 images of .*more.beton, found none for 10, such as 0/7.jpg"):
            open_training_set(train_recipe(inputs, ("data.train", str(more))))

    def test_the_recipe_may_leave_them_out(self, inputs: Path, more: Path) -> None:
        changes = ("data.train", str(more)), ("data.missing_labels", "skip")
        training = open_training_set(train_recipe(inputs, *changes))
        keys = {training.beton.manifest.keys[row] for row in training.rows}
        assert keys == set(open_beton(inputs / "train.beton").manifest.keys)
        assert (training.store_rows[training.rows] >= 0).all()

    def test_labels_of_other_images_are_refused(self, inputs: Path) -> None:
        write_digits(inputs / "changed", 7, first=20)
        pack_folder(inputs / "changed", inputs / "changed.beton")
        with pytest.raises(DataError, match=r"found labels of other images under 70 of the keys, such as 0/0.jpg"):
            open_training_set(train_recipe(inputs, ("data.train", str(inputs / "changed.beton"))))

    def test_labels_of_another_class_list_are_refused(self, inputs: Path) -> None:
        for digit in range(10):
            shutil.copytree(inputs / "train" / str(digit), inputs / "renamed" / f"digit {digit}")
        pack_folder(inputs / "renamed", inputs / "renamed.beton")
        with pytest.raises(DataError, match=r"expected labels of the class list of .* found those of another"):
            open_training_set(train_recipe(inputs, ("data.train", str(inputs / "renamed.beton"))))

    def test_pixels_that_are_no_longer_those_that_were_labelled(self, inputs: Path, monkeypatch) -> None:
        render = pipeline.probes._render
        monkeypatch.setattr(pipeline.probes, "_render", lambda *arguments: render(*arguments) ^ 255)
        with pytest.raises(
            DataError, match=r"labels.zarr: expected the pixels that were labelled, found others in 32 of"
        ):
            open_training_set(train_recipe(inputs))
        with pytest.raises(
            DataError, match=r"labels.zarr: expected the pixels that were labelled, found others in 32 of"
        ):
            label(label_recipe(inputs))

    def test_views_that_mix_need_the_whole_set(self, inputs: Path) -> None:
        store, part = inputs / "mixed.zarr", inputs / "part"
        mixing = ("views.mixup", "{alpha: 0.4}"), ("views.cutmix", "{alpha: 1.0}"), ("views.rand_augment", "{}")
        assert label(label_recipe(inputs, *mixing, ("store", str(store))))
        shutil.copytree(inputs / "train", part)
        (part / "3/2.jpg").unlink()
        pack_folder(part, inputs / "part.beton")
        changes = ("data.labels", str(store)), ("schedule.epochs", "2"), ("output", str(inputs / "mixed"))
        with pytest.raises(DataError, match=r"expected all 70 labelled images in .*part.beton, .* found 69; pack them"):
            open_training_set(train_recipe(inputs, *changes, ("data.train", str(inputs / "part.beton"))))
        assert train(train_recipe(inputs, *changes))

    def test_a_store_that_is_not_finished_is_refused(self, inputs: Path, other_run: Path) -> None:
        store = inputs / "unfinished.zarr"
        shutil.copytree(inputs / "labels.zarr", store)
        (store / "block_digest/c/1/1").unlink()
        with pytest.raises(DataError, match=r"view 1: expected all 3 blocks labelled, found 2"):
            train(train_recipe(inputs, ("data.labels", str(store)), ("output", str(other_run))))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("student.num_classes", "12"), DataError, "expected 12 classes, as the student has, found 10"),
        (("student.model", "mobilnetv2_100"), RecipeError, "student.model: no timm model is called 'mobilnetv2_100'"),
        (("batch_size", "71"), DataError, "expected at least batch_size = 71 rows to train on, found 70"),
        (("data.labels", "none.zarr"), DataError, "none.zarr: expected a store"),
        (("data.validation", "none.beton"), DataError, "none.beton: expected a packed image file, found none"),
    ],
)
def test_bad_recipes_leave_no_run_behind(
    inputs: Path, other_run: Path, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(train_recipe(inputs, change, ("output", str(other_run))))
    assert not (other_run / CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_stops_the_run(inputs: Path, other_run: Path) -> None:
    changes = ("optimizer.lr", "1e30"), ("optimizer.name", "sgd"), ("output", str(other_run))
    with pytest.raises(DataError, match=r"expected a finite loss, found .* lower optimizer.lr"):
        train(train_recipe(inputs, *changes))


def test_hard_labels_alone_train_a_plain_network(inputs: Path, other_run: Path) -> None:
    changes = ("data.labels", "null"), ("views", "{seed: 1, count: 2}"), ("student.expand", "null"), ("ema", "null")
    assert train(train_recipe(inputs, *changes, ("output", str(other_run))))
    result = evaluate(train_recipe(inputs, *changes, ("output", str(other_run))), other_run / WEIGHTS)
    assert result.images == 20


class TestWeights:
    def test_weights_of_another_student_are_refused(self, inputs: Path, run: Path) -> None:
        recipe = train_recipe(inputs, ("student.model", "mobilenetv2_050"))
        with pytest.raises(DataError, match=r"expected the weights of this recipe's student, found others"):
            evaluate(recipe, run / WEIGHTS)

    def test_weights_with_pickled_code_are_refused(self, inputs: Path, tmp_path: Path) -> None:
        torch.save({"a": _Evil(tmp_path / "ran")}, tmp_path / "weights.pt")
        with pytest.raises(FormatError, match=r"weights.pt: expected a .safetensors file, .* pickled code is not read"):
            evaluate(train_recipe(inputs), tmp_path / "weights.pt")
        assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
