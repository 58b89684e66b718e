"""The stages of benchmarks/gpu_check.py, each at its smallest on the CPU: no mistake in them waits for a GPU."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from gpu_stages import STAGES, student, teacher
from gpu_stages.numerics import layers, soft_labels, training
from gpu_stages.pipeline.overlap import covered, merged, overlap
from gpu_stages.stage import Setting
from gpu_stages.student.online import TEACHERS
from helpers.paths import ROOT
from torch import nn

import softshard.trainer.loop.run_folder
from softshard.trainer.losses import TailPolicy
from softshard.trainer.students import build_student
from softshard.trainer.students.fused import pointwise


@pytest.mark.parametrize("stages", [["pipeline"], ["numerics", "student", "teacher"]])
def test_every_stage_runs_on_a_cpu(stages: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny"]
    command += ["--stages", ",".join(stages), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert list(report["stages"]) == stages
    for found in report["stages"].values():
        assert (found["status"], found["why"]) == ("ok", "")
        assert list(found["checks"]) == found["planned"]
        for name, check in found["checks"].items():
            assert (check["status"], check["why"]) == ("ok", ""), name
            assert check["figures"], name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", STAGES)
def test_whole_stages_are_planned(stage: str, device: str, tmp_path: Path) -> None:
    """As on a machine with a GPU, without running anything."""
    module = __import__(f"gpu_stages.{stage}", fromlist=["checks"])
    names = [check.name for check in module.checks(Setting(device, False, tmp_path))]
    assert len(set(names)) == len(names) > 4
    assert all(name == name.strip() for name in names)


def test_the_models_exist() -> None:
    for name in (*TEACHERS, *teacher.MODELS):
        assert timm.is_model(name)
    with torch.device("meta"):
        for name in student.MODELS:
            build_student(name, 1000)


def test_a_layer_that_raises_leaves_the_others(tmp_path: Path) -> None:
    def conv() -> nn.Module:
        raise ValueError("out of\nregisters")

    cases = list(layers.pointwise_cases(True))[:2]
    broken = cases[0]._replace(name="broken", conv=conv)
    outcome = layers.compare(Setting("cpu", True, tmp_path), [broken, *cases], ["float32"])
    assert outcome.problems == ["broken, float32: ValueError: out of registers"]
    assert outcome.figures["float32"]["layers"] == 2


def test_a_layer_that_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor on one gradient, and a layer that trains in another form than it should."""
    right = pointwise.average_over_ranks
    monkeypatch.setattr(
        pointwise, "average_over_ranks", lambda count, first, *rest: (1.01 * first, *right(count, *rest))
    )
    case = next(layers.pointwise_cases(True))
    outcome = layers.compare(Setting("cpu", True, tmp_path), [case, case._replace(form="stacked")], ["float32"])
    wrong = [problem for problem in outcome.problems if "conv.weight: error 1.0e-02" in problem]
    assert wrong
    assert f"{case.name}: expected to train as stacked, found closed" in outcome.problems


def test_wrong_labels_and_losses_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, calls = Setting("cpu", True, tmp_path), itertools.count()
    decode_on, loss = soft_labels.decode_on, soft_labels.distillation_loss

    def nearly(*arguments: Any) -> Any:
        found = decode_on(*arguments)
        return found._replace(tail=found.tail + 1e-3) if next(calls) % 2 == 0 else found  # on one of the sides

    def doubled(logits: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        found = loss(logits, *arguments, **settings)
        return found._replace(total=2 * found.total) if logits.dtype == torch.bfloat16 else found

    monkeypatch.setattr(soft_labels, "decode_on", nearly)
    monkeypatch.setattr(soft_labels, "distillation_loss", doubled)
    assert "1000 classes, k = 10, T = 1, uniform: probabilities differ by 1.0e-03" in (
        soft_labels.check_decoding(setting).problems
    )
    problems = soft_labels.check_losses(setting).problems
    assert len(problems) == 12  # each tail policy, with and without a template, hard and mixed labels
    assert all("bfloat16: error 1.0e+00" in problem for problem in problems)


def test_every_tail_policy_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device in each dtype, on the CPU in float64, with and without a template, hard and mixed labels."""
    seen, loss = Counter[Any](), soft_labels.distillation_loss

    def counted(*arguments: Any, **settings: Any) -> Any:
        seen[settings["tail"]] += 1
        return loss(*arguments, **settings)

    monkeypatch.setattr(soft_labels, "distillation_loss", counted)
    outcome = soft_labels.check_losses(Setting("cpu", True, tmp_path))
    assert not outcome.problems
    assert seen == dict.fromkeys(get_args(TailPolicy), 2 * 2 * 2 * 3)


def test_a_checkpoint_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = softshard.trainer.loop.run_folder.load_checkpoint

    def forget(folder: Path) -> Any:
        state: Any = load(folder)
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
        return state

    monkeypatch.setattr(softshard.trainer.loop.run_folder, "load_checkpoint", forget)
    problems = training.check_resume(Setting("cpu", True, tmp_path), "float32", "auto").problems
    assert [problem.split(" differs")[0] for problem in problems] == [
        f"{kind}: {part}" for kind in ("deterministic", "cudnn.benchmark") for part in ("student", "ema", "optimizer")
    ]


# Intervals


def cells(intervals: Iterable[Any]) -> set[int]:
    """The same by brute force: which unit cells they cover."""
    return {cell for start, end in intervals for cell in range(start, end)}


@pytest.mark.parametrize("seed", range(50))
def test_intervals_are_sets_of_moments(seed: int) -> None:
    draw = random.Random(seed)
    some, others = (
        [(start, start + draw.randrange(0, 6)) for start in draw.choices(range(40), k=draw.randrange(8))]
        for _ in range(2)
    )
    assert covered(some) == len(cells(some))
    assert overlap(some, others) == overlap(others, some) == len(cells(some) & cells(others))
    union = merged(some)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(union))
    assert cells(union) == cells(some)


def test_touching_intervals_are_one() -> None:
    assert merged([(3.0, 4.0), (1.0, 2.0), (2.0, 3.0), (5.0, 5.0)]) == [(1.0, 4.0)]
    assert overlap([(0.0, 1.0)], [(1.0, 2.0)]) == 0.0
    assert covered([]) == overlap([], [(0.0, 1.0)]) == 0.0
