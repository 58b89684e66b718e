"""What cannot work is refused early, and what goes wrong says what to do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers.small_runs import acting, train_recipe
from helpers.small_teachers import Evil

import softshard.trainer.loop.train_state
from softshard.pipeline.runtime.errors import DataError, FormatError, RecipeError, SoftshardError
from softshard.trainer.data.training_set import open_training_set, rank_slice
from softshard.trainer.evaluate import evaluate
from softshard.trainer.loop.checks import (
    NOT_FINITE,
    OUT_OF_MEMORY,
    check_batch,
    check_same_start,
    memory_advice,
    not_finite,
)
from softshard.trainer.loop.run_folder import LAST
from softshard.trainer.loop.train import train
from softshard.trainer.losses import Losses

pytestmark = pytest.mark.usefixtures("one_thread")


# "..." stands for a library's own words.
REFUSED: list[tuple[list[tuple[str, str]], type[SoftshardError], str]] = [
    (
        [("student.num_classes", "12")],
        DataError,
        "{folder}/train.beton: expected 12 classes, as the student has, found 10; correct one",
    ),
    (
        [("student.model", "mobilnetv2_100")],
        RecipeError,
        "student.model: no timm model is called 'mobilnetv2_100' (near: mobilenetv2_100, mobilevitv2_100, "
        "mobilenetv2_140); timm.list_models() lists them",
    ),
    (
        [("batch_size", "71")],
        DataError,
        "{folder}/train.beton: expected at least batch_size = 71 rows to train on, found 70; lower batch_size",
    ),
    (
        [("data.labels", "none.zarr")],
        DataError,
        "none.zarr: expected a store of labels, found nothing there; check the path, or label first",
    ),
    (
        [("data.validation", "none.beton")],
        DataError,
        "none.beton: expected a packed image file, found none; make it with `softshard pack`",
    ),
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
        "optimizer.options: expected arguments of adamw, found {{'momentun': 0.9}}: ...; correct them",
    ),
    (
        [("optimizer.name", "fusedadam")],
        RecipeError,
        "optimizer.name: expected an optimizer that works here, found fusedadam: ...; name another one",
    ),
    (
        [("logging.trackers", "[tensorbord]")],
        RecipeError,
        f"logging.trackers: expected trackers of Accelerate ({', '.join(LOGGER_TYPE_TO_CLASS)}), found 'tensorbord'",
    ),
    (
        [("logging.trackers", "[comet_ml]")],
        RecipeError,
        "logging.trackers: expected comet_ml to be installed, found that it is not; pip install it",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_and_leaves_no_checkpoint(
    inputs: Path, tmp_path: Path, changes: list[tuple[str, str]], error: type[SoftshardError], message: str
) -> None:
    with pytest.raises(error) as found:
        train(train_recipe(inputs, *changes, ("output", str(tmp_path / "run"))))
    ours = map(re.escape, message.format(folder=inputs).split("..."))
    assert re.fullmatch(".+".join(ours), str(found.value))
    assert not (tmp_path / "run" / LAST).exists()


def test_the_batch_is_divided_among_processes_and_accumulation(inputs: Path) -> None:
    check_batch(train_recipe(inputs, ("accumulation", "2")), 4)
    message = (
        r"^batch_size: expected a multiple of 6, the number of processes \(3\) times accumulation \(2\), found 16; "
        r"correct one$"
    )
    with pytest.raises(RecipeError, match=message):
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


LAUNCHERS = [
    (
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        "train: expected no --dynamo_backend, because results depend on it, found inductor; set `compile: true` in the "
        "recipe",
    ),
    (
        {"ACCELERATE_USE_FSDP": "true"},
        "train: expected a whole model on each device, found --use_fsdp; start it without, with --multi_gpu",
    ),
    (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "train: expected a whole model on each device, found --use_deepspeed; start it without, with --multi_gpu",
    ),
    (
        {"WORLD_SIZE": "2"},
        "train: expected 2 processes, as the launcher says, found 1; start them with `accelerate launch --multi_gpu "
        "--num_processes N` or `torchrun --nproc_per_node N`",
    ),
]


@pytest.mark.parametrize(("variables", "message"), LAUNCHERS)
def test_a_launcher_that_asks_for_something_else_is_refused(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    Accelerator(cpu=True)  # as one process, whatever WORLD_SIZE says
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError) as found:
        train(train_recipe(inputs))
    assert str(found.value) == message


class TestNotFinite:
    @pytest.fixture
    def nan_in_update_six(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loss of the third update of the second epoch is not a number."""
        learn, count = softshard.trainer.loop.train_state.TrainState.learn, 0

        def broken(self, update, batch, soft) -> Losses:
            nonlocal count
            losses = learn(self, update, batch, soft)
            count += 1
            return losses._replace(total=losses.total * torch.nan) if count == 7 else losses

        monkeypatch.setattr(softshard.trainer.loop.train_state.TrainState, "learn", broken)

    def test_it_stops_the_run_and_its_keys_are_in_a_file(
        self, inputs: Path, tmp_path: Path, nan_in_update_six: None
    ) -> None:
        recipe = train_recipe(inputs, ("output", str(tmp_path / "run")), ("logging.updates", "100"))
        message = (
            rf"^{tmp_path}/run: epoch 2, step 3: expected a finite loss, found nan; the keys of the 16 images are in "
            rf"{tmp_path}/run/{NOT_FINITE}; under another output, lower optimizer.lr \(0.001\), warm up longer "
            r"\(schedule.warmup_epochs 1\), or set optimizer.clip_grad$"
        )
        with pytest.raises(DataError, match=message):
            train(recipe)
        training = open_training_set(recipe)
        rows = rank_slice(training.order(recipe.seed, 1), 16, 0, 1)[2]
        keys = (tmp_path / "run" / NOT_FINITE).read_text().splitlines()
        assert keys == [training.beton.manifest.keys[row] for row in rows]

    @pytest.mark.parametrize("updates", ["100", "1"])
    def test_weights_that_are_not_finite_are_never_saved(self, inputs: Path, tmp_path: Path, updates: str) -> None:
        """An update whose loss is finite may break them: the loss of the next one shows it, or a look before a save."""
        changes = ("output", str(tmp_path / "run")), ("logging.updates", updates), ("checkpoint_minutes", "1e-9")

        def break_weights(state: softshard.trainer.loop.train_state.TrainState) -> None:
            with torch.no_grad():
                next(state.student.parameters())[0] = torch.inf

        message = (
            rf"^{tmp_path}/run: epoch 2, step 3: expected finite weights after it, found others; the keys of the 16 "
            rf"images are in {tmp_path}/run/{NOT_FINITE}; under another output, lower optimizer.lr \(0.001\), warm up "
            r"longer \(schedule.warmup_epochs 1\), or set optimizer.clip_grad$"
        )
        with acting(7, break_weights, after=True), pytest.raises(DataError, match=message):
            train(train_recipe(inputs, *changes))
        state = torch.load(tmp_path / "run" / LAST, weights_only=True)
        assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 2)
        assert all(tensor.isfinite().all() for tensor in state["learner"]["student"].values())

    def test_what_half_precision_may_try(self, inputs: Path) -> None:
        error = not_finite(train_recipe(inputs, ("precision", "fp16")), 0, 0, "a finite loss, found inf", [], False)
        assert str(error).endswith(", or set optimizer.clip_grad, or precision: bf16")

    def test_nothing_that_follows_it_is_kept(self, inputs: Path, tmp_path: Path, nan_in_update_six: None) -> None:
        recipe = train_recipe(inputs, ("output", str(tmp_path / "run")), ("checkpoint_minutes", "1e-9"))
        with pytest.raises(DataError, match="epoch 2, step 3: expected a finite loss"):
            train(recipe)
        progress = torch.load(tmp_path / "run" / LAST, weights_only=True)["progress"]
        assert (progress["epoch"], progress["step"]) == (1, 2)
        assert np.isfinite(progress["sums"]).all()


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_half_precision_is_no_advice_for_those_who_have_it(inputs: Path, text: str) -> None:
    recipe = train_recipe(inputs, ("precision", "bf16"))
    with pytest.raises(DataError) as found, memory_advice(recipe, torch.device("cuda"), 2):
        raise RuntimeError(f"CUDA error: {text}")
    assert str(found.value) == (
        f"{inputs}/run: expected room for 8 images of 32 pixels at once, found the memory of cuda full; raise "
        "accumulation (1), which leaves the global batches as they are, or lower batch_size (16)"
    )


@pytest.mark.parametrize("fails", ["gpu", "cpu"])
def test_out_of_memory_says_which_setting_to_change(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def learn(*_):
        if fails == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return torch.empty(2**56)  # what the CPU's allocator says of it

    monkeypatch.setattr(softshard.trainer.loop.train_state.TrainState, "learn", learn)
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

    monkeypatch.setattr(softshard.trainer.loop.train_state.TrainState, "learn", learn)
    with pytest.raises(RuntimeError, match="something else"):
        train(train_recipe(inputs, ("output", str(tmp_path / "run"))))


class TestWeights:
    def test_weights_of_another_student_are_refused(self, inputs: Path, tmp_path: Path) -> None:
        assert train(train_recipe(inputs, ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))))
        recipe = train_recipe(inputs, ("student.model", "mobilenetv2_050"))
        message = (
            rf"^{tmp_path}/run/model.safetensors: expected the weights of this recipe's student, found others: missing "
            r".* more; unknown .* more; .*take the recipe that they were trained with$"
        )
        with pytest.raises(DataError, match=message):
            evaluate(recipe, tmp_path / "run/model.safetensors")

    def test_weights_with_pickled_code_are_refused(self, inputs: Path, tmp_path: Path) -> None:
        torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "weights.pt")
        with pytest.raises(FormatError, match=r"weights.pt: expected a .safetensors file, .* pickled code is not read"):
            evaluate(train_recipe(inputs), tmp_path / "weights.pt")
        assert not (tmp_path / "ran").exists()
