import json
import re
from pathlib import Path

import pytest
from helpers.paths import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from softshard.pipeline.cli import overrides
from softshard.pipeline.recipes.recipe import LabelRecipe, Model, PackRecipe, ViewRecipe
from softshard.pipeline.recipes.yaml_file import differences, dump_recipe, load_recipe
from softshard.pipeline.runtime.errors import RecipeError
from softshard.trainer.recipe import TrainRecipe

KINDS = {"source": PackRecipe, "teachers": LabelRecipe, "student": TrainRecipe}
LABEL = """
beton: train.beton
store: labels.zarr
classes: 10
views: {seed: 0, count: 8}
teachers: [{model: resnet10t, size: 32}]
top_k: 5
"""
TRAIN = """
data: {train: t.beton, validation: v.beton, labels: labels.zarr, size: 32}
student: {model: resnet10t, num_classes: 10}
optimizer: {lr: 1e-3}
schedule: {epochs: 4}
batch_size: 8
output: runs/x
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *changes: tuple[str, str], model: type[Model] = LabelRecipe) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(model, path, changes)
    return [line.replace(str(path), "F") for line in str(error.value).splitlines()]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_in_configs_loads(path: Path) -> None:
    text = path.read_text()
    [kind] = [kind for key, kind in KINDS.items() if f"\n{key}:" in f"\n{text}"]
    load_recipe(kind, path)


def test_a_dumped_recipe_loads_to_an_equal_one(tmp_path: Path) -> None:
    for model, text in ((LabelRecipe, LABEL), (TrainRecipe, TRAIN)):
        recipe = load_recipe(model, write(tmp_path, text))
        assert load_recipe(model, write(tmp_path, dump_recipe(recipe))) == recipe


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        ViewRecipe,
        seed=st.integers(0, 2**64 - 1),
        count=st.integers(1, 10**6),
        hflip=st.floats(0, 1),
    )
)
def test_every_view_recipe_survives_yaml(tmp_path_factory: pytest.TempPathFactory, views: ViewRecipe) -> None:
    path = write(tmp_path_factory.mktemp("views"), dump_recipe(views))
    assert load_recipe(ViewRecipe, path) == views


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = LABEL.replace("count: 8", "count: 8, hflop: 0.5, count: 9").replace("classes: 10", 'classes: "10"')
    text = text.replace("top_k: 5", "topk: 5").replace("size: 32", "size: 0")
    assert problems(tmp_path, text) == [
        "F: views.count: duplicate key (got it again in line 5)",
        'F: classes: input should be a valid integer (got "10")',
        "F: views.hflop: unknown key; near: hflip (got 0.5)",
        "F: teachers.0.size: input should be greater than or equal to 1 (got 0)",
        "F: top_k: missing key",
        "F: topk: unknown key; near: top_k (got 5)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LABEL.replace("seed: 0", "seed: 0.5"), "views.seed: input should be a valid integer (got 0.5)"),
        (LABEL.replace("seed: 0", "seed: true"), "views.seed: input should be a valid integer (got true)"),
        (LABEL.replace("seed: 0", "seed: null"), "views.seed: input should be a valid integer (got null)"),
        (LABEL + "batch_size: -1", "batch_size: input should be greater than or equal to 1 (got -1)"),
        (LABEL.replace("top_k: 5", "top_k: 11"), "top_k: expected at most classes = 10 (got 11)"),
        (
            LABEL.replace("count: 8", "count: 8, crop: {scale: [1.0, 0.5]}"),
            "views.crop.scale: the lower bound comes first (got [1.0, 0.5])",
        ),
        (LABEL.replace("count: 8", "count: 8, hflip: .nan"), "views.hflip: input should be a finite number (got NaN)"),
        (LABEL + "beton: other.beton", "beton: duplicate key (got it again in line 8)"),
        ("[1, 2]", "expected a mapping of sections, found list; see configs/ for examples"),
        ("", "expected a mapping of sections, found NoneType; see configs/ for examples"),
    ],
)
def test_one_problem(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [f"F: {expected}"]


def test_what_is_not_yaml(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, LABEL.replace("count: 8}", "count: 8"))
    assert re.fullmatch(r"F: expected YAML, found: while parsing a flow mapping .* line 5, column 8: .*", problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            TRAIN.replace("labels: labels.zarr", "labels: null"),
            "views: expected a section, since data.labels is null (got none); add it, or name a store",
        ),
        (
            TRAIN + "views: {seed: 0, count: 1}",
            "views: expected none, since a store has the views it was made with (got some); remove them",
        ),
        (
            TRAIN.replace("labels: labels.zarr", "labels: [{store: a.zarr, weight: 0}]"),
            "data.labels.0.weight: input should be greater than 0 (got 0)",
        ),
        (
            TRAIN.replace("labels: labels.zarr", "labels: []"),
            "data.labels: tuple should have at least 1 item after validation, not 0 (got [])",
        ),
        (TRAIN + "loss: {alpha: 1.5}", "loss.alpha: input should be less than or equal to 1 (got 1.5)"),
        (TRAIN + "loss: {tail: sprad}", "loss.tail: input should be 'drop', 'lump' or 'spread' (got \"sprad\")"),
    ],
)
def test_train_recipe_problems(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text, model=TrainRecipe) == [f"F: {expected}"]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        # an unknown name, or one that cannot be used, says nothing about the rate
        ("lr: 50, name: lambb", "name: expected an optimizer of timm.optim, near: lamb, lambw, lambc (got 'lambb')"),
        ("lr: 50, name: qqqq", "name: expected an optimizer of timm.optim, near: adamw, lamb, sgd (got 'qqqq')"),
        (
            "lr: 50, name: adahessian",
            "name: expected an optimizer that takes first derivatives alone, such as adamw or lamb (got 'adahessian')",
        ),
        ("lr: 2.0", "lr: expected 1e-08 to 1, what lamb can work with (got 2)"),
        ("lr: 1e-9", "lr: expected 1e-08 to 1, what lamb can work with (got 1e-09)"),
        ("lr: 50, name: rmsprop", "lr: expected 1e-08 to 1, what rmsprop can work with (got 50)"),
        ("lr: 50, name: adagrad", "lr: expected 1e-08 to 1, what adagrad can work with (got 50)"),
        ("lr: 200.0, name: sgd", "lr: expected 1e-08 to 100, what sgd can work with (got 200)"),
        ("lr: 1e-9, name: sgd", "lr: expected 1e-08 to 100, what sgd can work with (got 1e-09)"),
        ("lr: 200.0, name: momentum", "lr: expected 1e-08 to 100, what momentum can work with (got 200)"),
        ("lr: 200.0, name: lars", "lr: expected 1e-08 to 100, what lars can work with (got 200)"),
        ("lr: 0", "lr: input should be greater than 0 (got 0)"),
    ],
)
def test_optimizers_that_are_refused(tmp_path: Path, optimizer: str, expected: str) -> None:
    text = TRAIN.replace("lr: 1e-3", optimizer)
    assert problems(tmp_path, text, model=TrainRecipe) == [f"F: optimizer.{expected}"]


PLAIN = ("sgd", "momentum", "nesterov", "lars", "nlars", "larc")  # what takes large rates


@pytest.mark.parametrize("optimizer", ["lr: 1e-8", "lr: 1", *(f"lr: 100, name: {name}" for name in PLAIN)])
def test_rates_at_the_limits(tmp_path: Path, optimizer: str) -> None:
    load_recipe(TrainRecipe, write(tmp_path, TRAIN.replace("lr: 1e-3", optimizer)))


STEPS = ": expected {} (got decay_epochs: {}, decay_rate: {})".format
BOTH = "both decay_epochs and decay_rate for name: step"
NEITHER = "neither decay_epochs nor decay_rate for name: cosine"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("warmup_epochs: 4", ".warmup_epochs: expected fewer than epochs = 4 (got 4)"),
        ("min_lr: 0.01", ".min_lr: expected at most optimizer.lr = 0.001 (got 0.01)"),
        ("min_lr: 0.0001, name: constant", ".min_lr: expected none for name: constant (got 0.0001); remove it"),
        (
            "min_lr: 0.0001, name: step, decay_epochs: 2, decay_rate: 0.5",
            ".min_lr: expected none for name: step (got 0.0001); remove it",
        ),
        ("name: step", STEPS(BOTH, None, None)),
        ("name: step, decay_epochs: 2", STEPS(BOTH, 2, None)),
        ("name: step, decay_rate: 0.5", STEPS(BOTH, None, 0.5)),
        ("decay_epochs: 2", STEPS(NEITHER, 2, None)),
        ("decay_rate: 0.5", STEPS(NEITHER, None, 0.5)),
        ("decay_epochs: 2, decay_rate: 0.5", STEPS(NEITHER, 2, 0.5)),
    ],
)
def test_schedules_that_are_refused(tmp_path: Path, schedule: str, expected: str) -> None:
    text = TRAIN.replace("epochs: 4", f"epochs: 4, {schedule}")
    assert problems(tmp_path, text, model=TrainRecipe) == [f"F: schedule{expected}"]


def test_one_store_is_a_list_of_one(tmp_path: Path) -> None:
    path = write(tmp_path, TRAIN)
    one = load_recipe(TrainRecipe, path)
    assert one.data.labels is not None
    assert [(part.store, part.weight) for part in one.data.labels] == [("labels.zarr", 1.0)]
    assert load_recipe(TrainRecipe, path, [("data.labels", "[{store: labels.zarr, weight: 1}]")]) == one
    assert (
        load_recipe(TrainRecipe, path, [("data.labels", "null"), ("views", "{seed: 0, count: 1}")]).data.labels is None
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    system = f"[Errno 2] No such file or directory: '{path}'"
    with pytest.raises(RecipeError) as error:
        load_recipe(PackRecipe, path)
    assert str(error.value) == f"{path}: expected a readable YAML recipe, found: {system}; check --config"


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    text = LABEL.replace("seed: 0", "seed: 010").replace("store: labels.zarr", "store: no")
    recipe = load_recipe(LabelRecipe, write(tmp_path, text.replace("count: 8", "count: 8, hflip: 1e-1")))
    assert (recipe.store, recipe.views.seed, recipe.views.hflip) == ("no", 10, 0.1)


def test_overrides_reach_sections_lists_and_absent_sections(tmp_path: Path) -> None:
    changes = overrides(
        ["--views.seed", "7", "--teachers.0.size=64", "--views.crop.scale", "[0.5, 1.0]", "--top_k", "3"]
    )
    recipe = load_recipe(LabelRecipe, write(tmp_path, LABEL), changes)
    assert (recipe.views.seed, recipe.teachers[0].size, recipe.top_k) == (7, 64, 3)
    assert recipe.views.crop is not None
    assert recipe.views.crop.scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("views.seed", "x"), '--views.seed: input should be a valid integer (got "x")'),
        (("views.sed", "1"), "--views.sed: unknown key; near: seed (got 1)"),
        (("teachers.0.wieght", "2"), "--teachers.0.wieght: unknown key; near: weight (got 2)"),
        (("template.view", "2"), "--template.view: unknown key; near: views (got 2)"),
        (("zoo", "2"), "--zoo: unknown key (got 2)"),
        (("teachers.1.size", "1"), "--teachers.1.size: expected a section named '1', found list"),
        (("classes.a.b", "1"), "--classes.a.b: expected a section named 'a', found int"),
        (("classes.a", "1"), "--classes.a: expected a key, found int above it"),
    ],
)
def test_override_problems_name_the_option(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert problems(tmp_path, LABEL, change) == [expected]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["views.seed", "1"], "command line: expected --section.key VALUE, found 'views.seed'"),
        (["--top_k"], "--top_k: expected a value after it, found the end of the line"),
    ],
)
def test_malformed_overrides(words: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        overrides(words)
    assert str(error.value) == expected


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(LabelRecipe, write(tmp_path, LABEL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.top_k = 3


def test_differences_name_the_leaves() -> None:
    one = {"a": 1, "views": {"seed": 0, "crop": [1, 2]}}
    assert not list(differences(one, json.loads(json.dumps(one))))
    assert list(differences(one, {"a": 2, "views": {"seed": 1, "crop": [1, 2]}})) == [
        "a: expected 1, found 2",
        "views.seed: expected 0, found 1",
    ]
    assert list(differences(one, {**one, "b": 2})) == ["b: expected None, found 2"]
