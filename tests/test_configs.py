"""The recipes of configs/: every student trains, the study's table is a table of runs, and labels fit together."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from helpers.paths import CONFIGS
from helpers.small_packs import recipe_for
from helpers.small_runs import write_digits, write_teacher

from softshard.pipeline.cli import overrides
from softshard.pipeline.images.pack import pack
from softshard.pipeline.labels.label import label
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.teachers import PUBLISHED
from softshard.trainer.loop.run_folder import LAST, WEIGHTS
from softshard.trainer.loop.train import train
from softshard.trainer.recipe import TrainRecipe

SCRIPT = runpy.run_path(str(CONFIGS.parent / "scripts/ablation_smoke.py"))
LABEL = {path.stem: path for path in sorted((CONFIGS / "label").glob("*.yaml"))}
STUDY = {path.stem: path for path in sorted((CONFIGS / "train").glob("*.yaml"))}
OWN = {name: CONFIGS / f"own/{name}.yaml" for name in ("teacher", "student")}
TRAIN = STUDY | OWN
FULL = [name for name in STUDY if "epochs" not in name]
WIDER = ("ghostnetv3_100", "ghostnetv3_130", "ghostnetv3_160")  # but for the width, the recipe of ghostnetv3_050
SMALL_LABELS = (
    "--classes 10 --views.count 50 --top_k 3 --min_top1 null --batch_size 160 --workers 1 --precision float32"
    " --teachers.0.model local-dir:teacher --teachers.0.size 32"
)
# GhostNets pool once more at their smallest, so 64 pixels are the fewest. Accelerate keeps a process's precision.
SMALL = (
    "--student.num_classes 10 --data.size 64 --data.workers 1 --batch_size 2 --accumulation 1 --schedule.epochs 1"
    " --schedule.warmup_epochs 0 --logging.trackers [] --evaluation.agreement 0 --precision float32"
)
SMALL_DATA = "--data.train data/imagenet_train.beton --data.validation data/imagenet_validation.beton"
SMALL_OWN = {
    # A vision transformer has one size. No published weights are here.
    "teacher": f"{SMALL_DATA} --data.size 224 --student.pretrained false",
    "student": f"{SMALL_DATA} --data.labels data/imagenet_beitv2.zarr",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 digits of 10 classes, to train on and to validate, packed and labeled under the names that recipes have."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "data").mkdir()
    write_digits(folder / "digits", 1)
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    for digit in range(4, 10):
        shutil.rmtree(folder / f"digits/{digit}")
    for split in ("train", "validation"):
        beton = folder / f"data/imagenet_{split}.beton"
        pack(recipe_for(folder / "digits", beton, classes=str(folder / "classes.txt")))
    write_teacher(folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert label(load_recipe(LabelRecipe, LABEL["imagenet_beitv2"], overrides(SMALL_LABELS.split())))
    return folder


def updates(run: Path) -> int:
    """How many updates the optimizer of a finished run has counted; LAMB for all weights, AdamW for each."""
    optimizer = torch.load(run / LAST, weights_only=True, mmap=True)["learner"]["optimizer"]
    parts = [*optimizer["param_groups"], *optimizer["state"].values()]
    [count] = {int(part["step"]) for part in parts if "step" in part}
    return count


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in WIDER else name for name in TRAIN]
)
def test_every_student_trains_two_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    changes = f"{SMALL} {SMALL_OWN.get(name, '')}"
    recipe = load_recipe(TrainRecipe, TRAIN[name], overrides(changes.split()))
    assert train(recipe)
    assert (Path(recipe.output) / WEIGHTS).exists()
    assert updates(Path(recipe.output)) == 2
    shutil.rmtree(recipe.output)  # a teacher takes gigabytes


def test_train_recipes_say_half_precision_and_have_an_output_each() -> None:
    recipes = [load_recipe(TrainRecipe, path) for path in TRAIN.values()]
    assert {recipe.precision for recipe in recipes} == {"bf16"}
    assert len({recipe.output for recipe in recipes}) == len(recipes)


def test_full_recipes_differ_in_their_students_alone() -> None:
    recipes = [load_recipe(TrainRecipe, TRAIN[name]) for name in FULL]
    assert len(recipes) == 6
    shared = [recipe.model_dump(exclude={"output": True, "student": {"model", "library"}}) for recipe in recipes]
    assert all(one == shared[0] for one in shared)
    base = recipes[0]
    assert (base.schedule.name, base.schedule.epochs, base.batch_size) == ("cosine", 600, 2048)
    assert base.student.expand
    assert (base.student.expand.branches, base.student.expand.scale_branch) == (3, True)


def test_label_recipes_have_the_same_views_and_published_teachers() -> None:
    recipes = [load_recipe(LabelRecipe, path) for path in LABEL.values()]
    assert len(recipes) == 4
    assert len({recipe.store for recipe in recipes}) == 4
    for recipe in recipes:
        assert recipe.views == recipes[0].views
        assert {teacher.model for teacher in recipe.teachers} <= set(PUBLISHED)


def test_every_row_of_the_study_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    variables, rows = SCRIPT["read_study"]()
    assert len(rows) > 30
    labeled, seen = set(), []
    for row in rows:
        *labeling, (package, verb, _, config, *words) = SCRIPT["words_of"](row, variables)
        for label_package, label_verb, _, label_config, *label_words in labeling:
            assert (label_package, label_verb) == ("pipeline", "label")
            labels = load_recipe(LabelRecipe, label_config, overrides(label_words))
            assert {teacher.model for teacher in labels.teachers} <= set(PUBLISHED)
            labeled.add(labels.store)
        assert (package, verb) == ("trainer", "train")
        recipe = load_recipe(TrainRecipe, config, overrides(words))
        assert recipe.output == f"runs/ablation/{row.name}"
        assert {part.store for part in recipe.data.labels or ()} <= labeled
        seen.append(recipe.model_dump(exclude={"output"}))
    assert len({row.name for row in rows}) == len(rows)
    assert all(recipe not in seen[:number] for number, recipe in enumerate(seen))


def test_the_studys_page_shows_its_rows() -> None:
    variables, rows = SCRIPT["read_study"]()
    page = (CONFIGS / "README.md").read_text()
    assert SCRIPT["with_table"](page, rows) == page, "run scripts/ablation_smoke.py --write"
    for name, words in variables.items():
        assert f'{name}="accelerate launch -m {words}"\n' in page
