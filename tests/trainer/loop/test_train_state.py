"""The train state: its optimizer, its schedule, its temperature, its average, and what accumulation does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.small_runs import assert_same, metrics, train_and_crash, train_recipe
from timm.layers import convert_sync_batchnorm
from torch import nn

import softshard.trainer.loop.train_state
from softshard.trainer.loop.run_folder import LAST
from softshard.trainer.loop.train import train
from softshard.trainer.loop.train_state import TrainState, make_optimizer, make_schedule, make_train_state
from softshard.trainer.student import make_student
from softshard.trainer.students import fold

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10


def learning_rates(tmp_path: Path, schedule: str) -> list[float]:
    """Of each update, for a learning rate of 1e-3."""
    recipe = train_recipe(tmp_path, ("schedule", schedule))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.lr)
    made, rates = make_schedule(recipe, optimizer, STEPS), []
    for update in range(recipe.schedule.epochs * STEPS):
        made.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


class TestOptimizer:
    @pytest.mark.parametrize("model", ["test_efficientnet", "ghostnetv3_050", "test_vit"])
    def test_norms_and_biases_have_no_weight_decay(self, tmp_path: Path, model: str) -> None:
        expand = "null" if model == "test_vit" else "{branches: 2, conv_types: [dense, depthwise, pointwise]}"
        changes = ("student.model", model), ("student.expand", expand), ("optimizer.weight_decay", "0.1")
        student = make_student(train_recipe(tmp_path, *changes, ("data.size", "160"))).network
        without = {
            parameter
            for module in student.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name == "bias" or isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
        }
        assert len(without) > 20
        groups = make_optimizer(train_recipe(tmp_path, *changes), student).param_groups
        decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
        assert len(decays) == len(list(student.parameters()))
        tokens = {parameter for name, parameter in student.named_parameters() if "pos_embed" in name or "token" in name}
        for parameter, decay in decays.items():
            assert decay == (0.0 if parameter in without or parameter in tokens else 0.1)

    @pytest.mark.parametrize("name", ["Lamb", "AdamW", "SGD", "Lion", "RMSprop"])
    def test_they_are_timms(self, tmp_path: Path, name: str) -> None:
        recipe = train_recipe(tmp_path, ("optimizer", f"{{name: {name.lower()}, lr: 1e-3}}"))
        assert type(make_optimizer(recipe, nn.Linear(2, 2))).__name__ == name

    def test_options_reach_it(self, tmp_path: Path) -> None:
        changes = ("optimizer.options", "{betas: [0.8, 0.95], eps: 1e-6}")
        [_, group] = make_optimizer(train_recipe(tmp_path, changes), nn.Linear(2, 2)).param_groups
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)

    @pytest.mark.parametrize(("mode", "bound"), [("norm", 1e-3), ("value", 1e-4), ("agc", 1e-4)])
    def test_gradients_are_clipped(self, inputs: Path, tmp_path: Path, mode: str, bound: float) -> None:
        """Plain gradient descent by one update, which the bound limits."""
        changes = [("schedule", "{name: constant, epochs: 1}"), ("batch_size", "64"), ("ema", "null")]
        descent = (
            "optimizer",
            f"{{name: sgd, lr: 1.0, weight_decay: 0, options: {{momentum: 0, nesterov: false}}, "
            f"clip_grad: {bound}, clip_mode: {mode}}}",
        )
        recipe = train_recipe(inputs, *changes, descent, ("output", str(tmp_path / "run")))
        before = make_student(recipe)
        assert train(recipe)
        after = make_student(recipe, tmp_path / "run/model.safetensors")
        moved = {
            name: (parameter - dict(before.named_parameters())[name]).detach()
            for name, parameter in after.named_parameters()
        }
        if mode == "norm":
            assert torch.cat([part.flatten() for part in moved.values()]).norm() == pytest.approx(bound, rel=0.01)
        elif mode == "value":
            assert max(part.abs().max() for part in moved.values()) == pytest.approx(bound, rel=0.01)
        else:
            for name, clipped in (("network.conv_stem.weight", True), ("network.classifier.weight", False)):
                weight = before.get_parameter(name).detach()
                ratios = moved[name].flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
                assert (float(ratios.max()) == pytest.approx(bound, rel=0.01)) == clipped


class TestSchedule:
    def test_each_warms_up_from_zero_within_the_epochs(self, tmp_path: Path) -> None:
        for rest in ("cosine", "linear", "step, decay_epochs: 3, decay_rate: 0.1", "constant"):
            rates = learning_rates(tmp_path, f"{{name: {rest}, epochs: 8, warmup_epochs: 2}}")
            assert rates[: 2 * STEPS] == pytest.approx([1e-3 * update / (2 * STEPS) for update in range(2 * STEPS)])
            assert max(rates) <= 1e-3

    def test_cosine(self, tmp_path: Path) -> None:
        rates = learning_rates(tmp_path, "{name: cosine, epochs: 4, min_lr: 1e-4}")
        half_way = 1e-4 + 9e-4 / 2
        assert (rates[0], rates[20]) == (pytest.approx(1e-3), pytest.approx(half_way))
        assert rates[-1] == pytest.approx(1e-4, rel=0.02)

    def test_linear(self, tmp_path: Path) -> None:
        rates = learning_rates(tmp_path, "{name: linear, epochs: 4, min_lr: 2e-4}")
        assert rates == pytest.approx([1e-3 - 8e-4 * update / 40 for update in range(40)])

    def test_step(self, tmp_path: Path) -> None:
        rates = learning_rates(tmp_path, "{name: step, epochs: 6, decay_epochs: 2, decay_rate: 0.5}")
        assert rates == pytest.approx([1e-3] * 20 + [5e-4] * 20 + [2.5e-4] * 20)

    def test_constant(self, tmp_path: Path) -> None:
        assert learning_rates(tmp_path, "{name: constant, epochs: 3}") == [1e-3] * 30


@pytest.fixture
def state(inputs: Path) -> TrainState:
    return make_train_state(Accelerator(cpu=True), train_recipe(inputs, ("loss.final_temperature", "1.0")), STEPS)


def test_the_temperature_goes_to_its_end_in_equal_steps(state: TrainState) -> None:
    temperatures = [state.temperature(update) for update in range(4 * STEPS)]
    assert (temperatures[0], temperatures[-1]) == (2.0, 1.0)
    steps = torch.tensor(temperatures).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -1 / 39), rtol=1e-4, atol=0)


def test_random_numbers_are_a_function_of_the_update(state: TrainState) -> None:
    draws = []
    for update in (3, 4, 3):
        state.begin(update)
        draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_average_keeps_decay_of_itself_at_each_update(inputs: Path, tmp_path: Path) -> None:
    """After the first update it is the weights, as timm has it."""
    changes = [
        ("schedule", "{name: constant, epochs: 1}"),
        ("batch_size", "32"),
        ("ema", "{decay: 0.75, warmup: false}"),
    ]
    recipe, run = train_recipe(inputs, *changes, ("output", str(tmp_path / "run"))), tmp_path / "run"
    train_and_crash(recipe, 1)
    first = torch.load(run / LAST, weights_only=True)["learner"]
    assert_same(first["ema"], first["student"])
    assert train(recipe)
    second, name = torch.load(run / LAST, weights_only=True)["learner"], "network.classifier.weight"
    expected = 0.75 * first["student"][name] + 0.25 * second["student"][name]
    torch.testing.assert_close(second["ema"][name], expected, rtol=1e-5, atol=1e-7)


def test_the_recipe_says_how_often_gradients_are_accumulated(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate lets a variable of its launcher go before the number that it was given."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    changes = ("accumulation", "4"), ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))
    with counted_steps() as steps:
        assert train(train_recipe(inputs, *changes))
    assert len(steps) == 8


@contextmanager
def counted_steps() -> Iterator[list[None]]:
    steps: list[None] = []

    class Counting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            steps.append(None)
            super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            softshard.trainer.loop.train_state, "make_optimizer", lambda _, network: Counting(network.parameters())
        )
        yield steps


def test_half_precision_trains(inputs: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        changes = ("precision", "bf16"), ("output", str(tmp_path / "half")), ("schedule.epochs", "2")
        assert train(train_recipe(inputs, *changes))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert train(train_recipe(inputs, ("output", str(tmp_path / "whole")), ("schedule.epochs", "2")))
    half, whole = metrics(tmp_path / "half"), metrics(tmp_path / "whole")
    assert half[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=0.05)
    assert half[-1]["loss"] != whole[-1]["loss"]


def test_a_student_with_synchronized_batch_norm_folds_to_the_same(inputs: Path) -> None:
    student = make_student(train_recipe(inputs)).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = student(images)
    names = list(student.state_dict())
    convert_sync_batchnorm(student)
    assert list(student.state_dict()) == names
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.modules())
    torch.testing.assert_close(student(images), expected)
    student.network = fold(student.network)
    torch.testing.assert_close(student(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, from inside of its compiler
def test_a_compiled_student_learns_the_same(inputs: Path, tmp_path: Path) -> None:
    for name in ("true", "false"):
        changes = ("compile", name), ("schedule.epochs", "2"), ("output", str(tmp_path / name))
        assert train(train_recipe(inputs, *changes))
    compiled, eager = metrics(tmp_path / "true"), metrics(tmp_path / "false")
    assert compiled[-1]["loss"] == pytest.approx(eager[-1]["loss"], rel=0.02)
