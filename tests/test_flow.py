"""The demo's recipes on a few images, end to end, through the command line; and what a user sees of bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.small_runs import write_digits

import softshard.pipeline.__main__
import softshard.trainer.__main__


def call(*words: str) -> int:
    package, *rest = words
    return {"pipeline": softshard.pipeline.__main__.main, "trainer": softshard.trainer.__main__.main}[package](rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's recipes and 64 + 20 digits where the demo puts them."""
    folder = tmp_path_factory.mktemp("flow")
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_digits(folder / "data/demo/train", 7)
    for digit in range(6):
        (folder / f"data/demo/train/{digit}/6.jpg").unlink()
    write_digits(folder / "data/demo/validation", 2, first=7)
    return folder


def test_the_demos_recipes_run_end_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    short = ("--schedule.epochs", "2", "--schedule.warmup_epochs", "1", "--batch_size", "16")
    config = "--config", "configs/demo/{}.yaml"

    def recipe(name: str) -> tuple[str, str]:
        return config[0], config[1].format(name)

    for split in ("train", "validation"):
        assert call("pipeline", "pack", *recipe(f"pack_{split}")) == 0
    assert call("trainer", "train", *recipe("teacher"), *short) == 0
    assert call("trainer", "export", "--run", "runs/demo/teacher", "--out", "export/demo/teacher") == 0
    assert call("pipeline", "label", *recipe("label")) == 0
    for kind in ("hard", "soft"):
        assert call("trainer", "train", *recipe(f"student_{kind}"), *short) == 0
    assert call("trainer", "export", "--run", "runs/demo/student_soft", "--out", "export/demo/student") == 0
    results = []
    for weights in ("runs/demo/student_soft/model.safetensors", "export/demo/student"):
        words = ("trainer", "evaluate", *recipe("student_soft"), "--weights", weights, "--json", "result.json")
        assert call(*words) == 0
        results.append(json.loads(Path("result.json").read_text()))
    assert results[0]["predictions"] == results[1]["predictions"]
    assert results[0]["parameters"] > results[1]["parameters"]
    assert json.loads(Path("data/demo/train.manifest.json").read_text())["keys"][0] == "0/0.jpg"
    assert len(json.loads(Path("data/demo/train.manifest.json").read_text())["keys"]) == 64


def test_hard_and_soft_students_share_start_views_and_budget() -> None:
    from softshard.pipeline.recipes.recipe import LabelRecipe
    from softshard.pipeline.recipes.yaml_file import load_recipe
    from softshard.trainer.recipe import TrainRecipe

    demo = ROOT / "configs/demo"
    hard, soft = (load_recipe(TrainRecipe, demo / f"student_{kind}.yaml") for kind in ("hard", "soft"))
    assert hard.views == load_recipe(LabelRecipe, demo / "label.yaml").views
    different = {"data", "views", "output"}
    assert hard.model_dump(exclude=different) == soft.model_dump(exclude=different)


BAD_COMMANDS = [
    (("pipeline", "pack", "--config", "none.yaml"), "none.yaml: expected a readable YAML recipe"),
    (("pipeline", "pack", "--config", "{pack}", "--sorce.path", "x"), "--sorce.path: unknown key"),
    (("pipeline", "pack", "--config", "{pack}", "--output"), "--output: expected a value after it"),
    (("pipeline", "pack", "--config", "{pack}", "--source.path", "none"), "source.path: expected a folder of class"),
    (("pipeline", "pack", "--config", "{pack}", "--output", "x.bin"), "output must end in .beton"),
    (("pipeline", "label", "--config", "{label}", "--beton", "none.beton"), "none.beton: expected a packed image file"),
    (("trainer", "train", "--config", "{train}", "--data.train", "none.beton"), "none.beton: expected a packed image"),
    (("trainer", "export", "--run", "none", "--out", "x"), "none: expected a finished run"),
    (
        ("trainer", "export", "--run", "none", "--out", "x", "--format", "onnx"),
        "--format: expected an option of `export`",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS, ids=lambda value: " ".join(value)[:60])
def test_bad_commands_end_with_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = ROOT / "configs/demo"
    paths = {"pack": demo / "pack_train.yaml", "label": demo / "label.yaml", "train": demo / "student_soft.yaml"}
    assert call(*(word.format(**paths) for word in words)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import softshard.pipeline.images.pack

    def full(*_):
        raise OSError(28, "No space left on device", "x.beton")

    monkeypatch.setattr(softshard.pipeline.images.pack, "pack", full)
    assert call("pipeline", "pack", "--config", str(ROOT / "configs/demo/pack_train.yaml")) == 2
    assert "x.beton: expected free disk, found none" in capsys.readouterr().err


def test_the_command_line_exits_with_the_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softshard", "pack", "--config", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.yaml: expected a readable YAML recipe")
    assert "Traceback" not in done.stderr
