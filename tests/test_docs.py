"""README.md and docs/: every block that can run on small data runs, every command and recipe shown is one, and the
pages hang together.

A block is left out by a comment on the line before it: <!-- not run: why -->.
"""

import argparse
import gc
import json
import re
import runpy
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.paths import CONFIGS, ROOT
from helpers.small_runs import mnist_data, write_teacher
from PIL import Image
from pydantic import ValidationError
from ruamel.yaml import YAML

from softshard.__main__ import main
from softshard.pipeline.__main__ import add_verbs as add_pipeline_verbs
from softshard.pipeline.cli import make_parser, overrides
from softshard.pipeline.recipes.recipe import LabelRecipe, Model, PackRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.trainer.__main__ import add_verbs as add_trainer_verbs
from softshard.trainer.loop.run_folder import LAST
from softshard.trainer.recipe import TrainRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = {"README": ROOT / "README.md", **{path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}}
MOST_README_LINES = 180
SPLIT = "scripts/split_images.py"
RECIPES: dict[str, type[Model]] = {
    "pack": PackRecipe,
    "label": LabelRecipe,
    "render": LabelRecipe,
    "verify": LabelRecipe,
    "train": TrainRecipe,
    "evaluate": TrainRecipe,
}
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]*) -->\n\s*)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
# Recipes of the docs, made small: by verb and by the folder of their recipe. One process keeps one precision.
SMALL_TRAIN = "--data.workers 1 --schedule.epochs 1 --schedule.warmup_epochs 0 --batch_size 8 --precision float32"
SMALL_NETWORK = "--student.model test_efficientnet --student.pretrained false --accumulation 1 --data.size 32"
SMALL = {
    ("label", "demo"): "--workers 1",
    ("verify", "demo"): "--workers 1",
    ("train", "demo"): f"{SMALL_TRAIN} --student.model test_efficientnet",
    ("evaluate", "demo"): f"{SMALL_TRAIN} --student.model test_efficientnet",
    ("label", "own"): "--views.count 3 --workers 1 --precision float32",
    ("train", "own"): f"{SMALL_TRAIN} {SMALL_NETWORK}",
    ("evaluate", "own"): f"{SMALL_TRAIN} {SMALL_NETWORK}",
    ("convert", ""): "--shard-samples 8",
    ("latency", ""): "--rounds 2",
}


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    text: str
    why_not: str | None


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["kind"], found["text"], found["why"])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNING = [page for page in PAGES if any(b.kind in ("bash", "python") and b.why_not is None for b in blocks_of(page))]


def lines_of(block: Block) -> list[list[str]]:
    """The words of each command."""
    lines = (shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def softshard_words(words: list[str]) -> list[str] | None:
    """What a command gives to softshard, also through a launcher; None for other programs."""
    if words[0] == "softshard":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] in ("softshard", "pipeline", "trainer"):
        return words[words.index("-m") + 2 :]
    return None


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves behind, small, and a folder photos/ with class folders."""
    folder = tmp_path_factory.mktemp("demo")
    images, labels = mnist_data()
    for digit in range(10):
        for number, pixels in enumerate(images[labels == digit][:5]):
            image = Image.fromarray(pixels.reshape(28, 28).astype(np.uint8))
            for root in (folder / "photos", folder / "data/demo" / ("train" if number else "validation")):
                (root / str(digit)).mkdir(parents=True, exist_ok=True)
                image.save(root / str(digit) / f"{number:03}.jpg")
    shutil.copy(folder / "photos/0/000.jpg", folder / "photo.jpg")
    write_teacher(folder / "export/demo/teacher")
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "pack --config configs/demo/pack_train.yaml",
            "pack --config configs/demo/pack_validation.yaml",
            "label --config configs/demo/label.yaml",
            "train --config configs/demo/student_soft.yaml",
        ):
            assert main(small(command.split())) == 0
    return folder


def small(words: Sequence[str]) -> list[str]:
    config = Path(words[words.index("--config") + 1]) if "--config" in words else Path()
    changes = SMALL.get((words[0], config.parent.name), "")
    return [*words, *changes.split()]


@pytest.mark.parametrize("page", RUNNING)
def test_the_blocks_of_a_page_run(page: str, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one folder; the later ones may need what the earlier ones made."""
    folder = tmp_path / "demo"
    shutil.copytree(small_demo, folder, symlinks=True)
    monkeypatch.chdir(folder)
    if page == "format":
        Path("labels.zarr").symlink_to("data/demo/labels.zarr")
    for block in blocks_of(page):
        if block.why_not is None and block.kind == "bash":
            for words in lines_of(block):
                run_command(words, f"{page}, line {block.line}")
        elif block.why_not is None and block.kind == "python" and not block.text.startswith(">>>"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # of webdataset
                exec(compile(block.text.replace("224, 224", "32, 32"), f"{page}, line {block.line}", "exec"), {})
                gc.collect()
    if page == "own-images":
        check_own_images()


def check_own_images() -> None:
    """Both networks have learned: 40 images in batches of 8."""
    for name in ("teacher", "student"):
        optimizer = torch.load(f"runs/own/{name}/{LAST}", weights_only=True)["learner"]["optimizer"]
        parts = [
            *optimizer["param_groups"],
            *optimizer["state"].values(),
        ]  # LAMB counts for all weights, AdamW for each
        assert {int(part["step"]) for part in parts if "step" in part} == {5}


def run_command(words: list[str], where: str) -> None:
    given = softshard_words(words)
    if given is not None:
        assert main(small(given)) == 0, f"{where}: {words}"
    else:
        assert words[:2] == ["python", SPLIT], f"{where}: say why {words} is not run"
        assert runpy.run_path(words[1])["main"](words[2:]) == 0, f"{where}: {words}"


def parser() -> argparse.ArgumentParser:
    return make_parser("softshard", None, [add_pipeline_verbs, add_trainer_verbs])


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options_and_keys(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks_of(page):
        for words in lines_of(block) if block.kind == "bash" else ():
            given = softshard_words(words)
            if given is None or given == ["--help"]:
                continue
            known, rest = parser().parse_known_args(given)
            config = getattr(known, "config", None)
            changes = overrides(rest)
            assert config or not changes, f"{words}: unknown options {rest}"
            if config:
                load_recipe(RECIPES[known.verb], config, changes)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_a_verb(page: str) -> None:
    verbs = re.findall(r"\{(.*?)\}", parser().format_usage()) or re.findall(r"^    (\w+)", parser().format_help(), re.M)
    for verb in re.findall(
        r"`(?:softshard|python -m (?:pipeline|trainer|softshard)) (\w+)[^`]*`", PAGES[page].read_text()
    ):
        assert verb in verbs or verb == "VERB", f"{page}: {verb}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(
        r"(?:softshard|pipeline|teachers|trainer|tests|scripts|benchmarks)/[\w/]+\.(?:py|c|sh|yaml)",
        PAGES[page].read_text(),
    )
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = PAGES[page].read_text()
    shown = re.findall(r"`make ([\w-]+)", text) + re.findall(r"^\s*make ([\w-]+)", text, re.M)
    assert set(shown) <= targets


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.kind == "yaml"], ids=lambda block: f"{block.page}-{block.line}"
)
def test_yaml_blocks_are_recipes_or_parts_of_one(block: Block) -> None:
    data = YAML(typ="safe", pure=True).load(block.text)
    data = {"student": data} if set(data) == {"expand"} else data
    model = next(model for model in (PackRecipe, TrainRecipe, LabelRecipe) if set(data) <= set(model.model_fields))
    assert {kind for kind in problems(model, data) if kind != "missing"} == set()


def problems(model: type[Model], data: Any) -> list[str]:
    try:
        model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return [problem["type"] for problem in error.errors()]
    return []


def test_the_readme_is_a_front_door() -> None:
    assert len(PAGES["README"].read_text().splitlines()) <= MOST_README_LINES


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the site are checked when it is built."""
    for link in re.findall(r"\]\((?!https://)([^)#\s]+)", PAGES["README"].read_text()):
        assert (ROOT / link).exists(), link


def test_every_page_is_in_the_navigation() -> None:
    shown: Any = YAML(typ="safe", pure=True).load((ROOT / "mkdocs.yml").read_text())["nav"]
    names = [page for part in shown for page in ([part] if isinstance(part, str) else next(iter(part.values())))]
    assert sorted(names) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_own_recipes_name_each_others_files() -> None:
    own = CONFIGS / "own"
    train, validation = (load_recipe(PackRecipe, own / f"pack_{split}.yaml") for split in ("train", "validation"))
    label = load_recipe(LabelRecipe, own / "label.yaml")
    teacher, student = (load_recipe(TrainRecipe, own / f"{name}.yaml") for name in ("teacher", "student"))
    assert {label.beton, teacher.data.train, student.data.train} == {train.output}
    assert {teacher.data.validation, student.data.validation} == {validation.output}
    assert student.data.labels
    assert [part.store for part in student.data.labels] == [label.store]
    assert label.classes == teacher.student.num_classes == student.student.num_classes
