import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers.small_runs import (
    LABEL,
    label_recipe,
    launch,
    make_inputs,
    pack_folder,
    write_digits,
    write_recipe,
    write_teacher,
)
from helpers.small_stores import files_of

from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.labels.label import estimate, label
from softshard.pipeline.labels.spot_check import codes_differences
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import decode
from softshard.pipeline.views.loader import ViewLoader
from softshard.teachers import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="module")
def store_path(inputs: Path) -> Path:
    """A store labeled without interruption by one process."""
    assert label(label_recipe(inputs))
    return inputs / "labels.zarr"


@pytest.fixture
def other_store(inputs: Path) -> Iterator[Path]:
    path = inputs / "other.zarr"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_labels_are_the_teachers_for_the_same_pixels(inputs: Path, store_path: Path) -> None:
    recipe, beton, store = label_recipe(inputs), open_beton(inputs / "train.beton"), open_store(store_path)
    network: Any = timm.create_model(f"local-dir:{inputs / 'teacher'}", pretrained=True).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    loader = ViewLoader(beton, recipe.views, 32, 70, 2, CPU)
    for view in range(3):
        [batch] = loader.render(np.arange(70), view)
        with torch.inference_mode():
            expected = torch.softmax(network((batch.images / 255 - mean) / std), dim=1)
        codes = store.read_view(view)
        soft = decode(
            torch.from_numpy(codes.index.astype(np.int64)),
            torch.from_numpy(codes.gap),
            torch.from_numpy(codes.tail),
            10,
            1.0,
        )
        kept = expected.gather(1, soft.index)
        # steps of 1/16 nat: each ratio of probabilities is off by half a step, 3.2 %, so a probability by at most 6.5 %
        torch.testing.assert_close(soft.probability, kept, rtol=0.065, atol=1e-4)
        assert (kept[:, 0] == expected.max(dim=1).values).all()


def test_the_process_cache_makes_the_same_store(inputs: Path, store_path: Path, other_store: Path) -> None:
    assert label(label_recipe(inputs, ("store", str(other_store)), ("os_cache", "false")))
    assert files_of(other_store) == files_of(store_path)


def test_the_random_teachers_labels_vary(store_path: Path) -> None:
    """Otherwise the tests of this file would see little."""
    first, second = open_store(store_path).read_view(0), open_store(store_path).read_view(1)
    assert len(np.unique(first.index[:, 0])) > 2
    assert (first.gap != second.gap).any()


def test_a_finished_store_is_left_alone(inputs: Path, store_path: Path) -> None:
    before = files_of(store_path)
    assert label(label_recipe(inputs))
    assert files_of(store_path) == before


KILLED = """
import os, sys
from pathlib import Path
from typing import Any
import softshard.pipeline.store.zarr_group as zarr_store
from softshard.pipeline.labels.label import estimate, label
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe
write, digests = zarr_store.ZarrGroup.write, []
def write_or_die(self, name, selection, values):
    if name == "block_digest":
        digests.append(name)
        if len(digests) == 4:
            os._exit(9)  # the codes of this block are written, its digest is not
    write(self, name, selection, values)
zarr_store.ZarrGroup.write = write_or_die
label(load_recipe(LabelRecipe, Path(sys.argv[1]), [("store", sys.argv[2])]))
"""


def test_labeling_goes_on_after_a_kill_and_ends_the_same(inputs: Path, store_path: Path, other_store: Path) -> None:
    recipe = write_recipe(inputs, "killed", LABEL)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(other_store)], capture_output=True, timeout=120
    )
    assert killed.returncode == 9, killed.stderr.decode()
    assert open_store(other_store).coverage().sum() == 3
    assert label(label_recipe(inputs, ("store", str(other_store))))
    assert files_of(other_store) == files_of(store_path)


def test_two_processes_make_the_same_store_as_one(inputs: Path, store_path: Path, other_store: Path) -> None:
    recipe = write_recipe(inputs, "launched", LABEL)
    done = launch("softshard.pipeline", "label", "--config", str(recipe), "--store", str(other_store))
    assert done.returncode == 0, done.stderr
    assert "label: 2 processes on cpu" in done.stdout
    assert files_of(other_store) == files_of(store_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("views.seed", "2"), "views.seed: expected 2, found 1"),
        (("views.count", "2"), "views.count: expected 2, found 3"),
        (("template", "{views: 2}"), "template"),
        (("flip_average", "true"), "flip_average: expected True, found False"),
        (("precision", "bf16"), "precision: expected 'bf16', found 'float32'"),
        (("top_k", "4"), "top_k: expected 4, found 3"),
        (("batch_size", "8"), "batch_size: expected 8, found 16"),
        (("teachers.0.weight", "2.0"), "teachers"),
    ],
)
def test_a_store_of_another_recipe_is_refused(
    inputs: Path, store_path: Path, change: tuple[str, str], difference: str
) -> None:
    before = files_of(store_path)
    with pytest.raises(DataError, match=f"expected a store of this recipe, found another: {difference}"):
        label(label_recipe(inputs, change))
    assert files_of(store_path) == before


def test_a_store_of_another_teacher_is_refused(inputs: Path, store_path: Path) -> None:
    write_teacher(inputs / "teacher2", seed=1)
    with pytest.raises(DataError, match=r"found another: teachers"):
        label(label_recipe(inputs, ("teachers.0.model", f"local-dir:{inputs / 'teacher2'}")))


def test_a_store_of_other_images_is_refused(inputs: Path, store_path: Path) -> None:
    write_digits(inputs / "others", 7, first=20)  # the same keys, other digits
    pack_folder(inputs / "others", inputs / "others.beton")
    with pytest.raises(DataError, match=r"expected labels of the images in .*others.beton, found those of others"):
        label(label_recipe(inputs, ("beton", str(inputs / "others.beton"))))


def test_a_store_of_another_version_is_refused(inputs: Path, store_path: Path, other_store: Path) -> None:
    shutil.copytree(store_path, other_store)
    metadata = other_store / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatError, match=r"format version 2, this softshard reads 1"):
        label(label_recipe(inputs, ("store", str(other_store))))


def test_the_teachers_class_count_must_be_the_recipes(inputs: Path, other_store: Path) -> None:
    write_teacher(inputs / "teacher12", classes=12)
    changes = ("teachers.0.model", f"local-dir:{inputs / 'teacher12'}"), ("store", str(other_store))
    with pytest.raises(DataError, match=r"expected 10 classes, as the recipe says, found 12"):
        label(label_recipe(inputs, *changes))
    assert not other_store.exists()


def test_the_class_list_must_be_as_long_as_the_recipe_says(inputs: Path, other_store: Path) -> None:
    with pytest.raises(DataError, match=r"train.beton: expected 12 classes, as the recipe says, found 10"):
        label(label_recipe(inputs, ("classes", "12"), ("store", str(other_store))))
    assert not other_store.exists()


def test_logits_that_are_not_finite_stop_the_run_before_a_block_is_written(inputs: Path, other_store: Path) -> None:
    folder = inputs / "broken"
    shutil.copytree(inputs / "teacher", folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["fc.bias"][3] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    changes = ("teachers.0.model", f"local-dir:{folder}"), ("store", str(other_store))
    with pytest.raises(DataError, match=r"expected finite logits, found NaN .* 16 images, such as view 0 of 0/0.jpg"):
        label(label_recipe(inputs, *changes))
    assert not other_store.exists()


def test_a_full_disk_loses_only_the_block_in_flight(
    inputs: Path, store_path: Path, other_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zarr.storage

    write, budget = zarr.storage.LocalStore.set, [30]

    async def set_until_full(self, key, value):
        budget[0] -= 1
        if budget[0] < 0:
            raise OSError(28, "No space left on device")
        await write(self, key, value)

    recipe = label_recipe(inputs, ("store", str(other_store)))
    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.LocalStore, "set", set_until_full)
        with pytest.raises((DataError, OSError), match=r"No space left on device"):
            label(recipe)
    assert 0 < open_store(other_store).coverage().sum() < 9
    assert label(recipe)
    assert files_of(other_store) == files_of(store_path)


def reference_logits(inputs: Path, views: int, size: int = 32) -> torch.Tensor:
    """What the teacher says about each view, [V, N, C]."""
    recipe, beton = label_recipe(inputs), open_beton(inputs / "train.beton")
    teacher = load_teacher(f"local-dir:{inputs / 'teacher'}", "timm", None, size, 10)
    loader = ViewLoader(beton, recipe.views, size, 70, 2, CPU)
    with torch.inference_mode():
        return torch.stack(
            [teacher(batch.images) for view in range(views) for batch in loader.render(np.arange(70), view)]
        )


def test_a_template_is_the_mean_over_the_first_views(inputs: Path, store_path: Path, other_store: Path) -> None:
    assert label(label_recipe(inputs, ("store", str(other_store)), ("template", "{views: 2}")))
    store, plain = open_store(other_store), open_store(store_path)
    logits = reference_logits(inputs, 3)
    mean = torch.log_softmax(logits[:2].double(), dim=2).mean(dim=0)
    steps = 2 * (mean.amax(dim=1, keepdim=True) - mean)
    assert ((torch.from_numpy(store.read_template()).double() - steps).abs() <= 0.5 + 1e-3).all()
    for view in range(3):  # the codes do not depend on it
        assert codes_differences(logits[view].double(), store.read_view(view)).max() < 1e-4
        assert codes_differences(logits[view].double(), plain.read_view(view)).max() < 1e-4


def test_views_added_later_are_those_of_a_larger_store(inputs: Path, other_store: Path, tmp_path: Path) -> None:
    changes = ("template", "{views: 2}"), ("views.count", "5")
    assert label(label_recipe(inputs, ("store", str(other_store)), changes[0]))
    before = files_of(other_store)
    assert label(label_recipe(inputs, ("store", str(other_store)), *changes))
    assert label(label_recipe(inputs, ("store", str(tmp_path / "at_once.zarr")), *changes))
    grown, at_once = files_of(other_store), files_of(tmp_path / "at_once.zarr")
    del grown["zarr.json"], at_once["zarr.json"]  # their probes are of other views
    assert grown == at_once
    chunks = {name for name in before if "zarr.json" not in name}
    assert all(grown[name] == before[name] for name in chunks)
    assert open_store(other_store).manifest.views.count == 5


def test_a_part_of_the_views_is_labeled(inputs: Path, store_path: Path, other_store: Path) -> None:
    recipe = label_recipe(inputs, ("store", str(other_store)))
    assert label(recipe, range(1, 2))
    assert open_store(other_store).coverage().tolist() == [0, 3, 0]
    assert label(recipe)
    assert files_of(other_store) == files_of(store_path)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (range(2, 4), "--views: expected numbers from 0 to 2, as views.count says, found 3"),
        (range(1), "--views: expected all of the views 0-1 that make the tail template or none of them, found 0-0"),
        (range(1, 3), "found 1-2; go from 0 to 1 at least, or start at 2"),
    ],
)
def test_views_that_do_not_fit_are_refused(inputs: Path, other_store: Path, views: range, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label(label_recipe(inputs, ("store", str(other_store)), ("template", "{views: 2}")), views)
    assert not other_store.exists()


def test_an_estimate_writes_nothing(inputs: Path, other_store: Path, store_path: Path) -> None:
    text = estimate(label_recipe(inputs, ("store", str(other_store)), ("template", "{views: 2}")))
    assert not other_store.exists()
    teachers, run = text.splitlines()
    assert teachers.startswith("teachers: top-1 ")
    assert "on 70 views, mean confidence 0." in teachers
    assert run.startswith("estimate: 3 views of 70 images, ")
    assert "bytes a view, template" in run


def test_a_teacher_below_min_top1_labels_nothing(inputs: Path, other_store: Path) -> None:
    recipe = label_recipe(inputs, ("store", str(other_store)), ("min_top1", "99.9"))
    for stage in (label, estimate):
        with pytest.raises(DataError, match=r"expected a top-1 of min_top1 = 99.9 % .*, found \d+\.\d % on 70 views"):
            stage(recipe)
    assert not other_store.exists()


def test_the_status_says_how_often_the_teacher_is_right(inputs: Path, other_store: Path, capsys) -> None:
    assert label(label_recipe(inputs, ("store", str(other_store))))
    out, err = capsys.readouterr()
    right = (reference_logits(inputs, 3).argmax(dim=2) == torch.arange(10).repeat_interleave(7)).double().mean()
    assert f"view 2, top-1 {100 * right:.1f} %" in err
    assert "teachers: top-1" in out


def test_no_room_is_noticed_before_the_work(inputs: Path, other_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"other.zarr: expected about \d+ MB of free disk .*, found 0 MB; make room"):
        label(label_recipe(inputs, ("store", str(other_store))))
    assert open_store(other_store).coverage().sum() == 0


def test_several_teachers_each_see_their_own_size(inputs: Path, other_store: Path) -> None:
    write_teacher(inputs / "teacher3", seed=3)
    first = f"{{model: 'local-dir:{inputs}/teacher', size: 32, weight: 3}}"
    teachers = f"[{first}, {{model: 'local-dir:{inputs}/teacher3', size: 48}}]"
    changes = ("store", str(other_store)), ("teachers", teachers), ("flip_average", "true"), ("views.count", "1")
    assert label(label_recipe(inputs, *changes, ("top_k", "10")))
    expected = torch.zeros(70, 10, dtype=torch.double)
    beton, recipe = open_beton(inputs / "train.beton"), label_recipe(inputs)
    for name, size, share in (("teacher", 32, 0.75), ("teacher3", 48, 0.25)):
        teacher = load_teacher(f"local-dir:{inputs / name}", "timm", None, size, 10)
        [batch] = ViewLoader(beton, recipe.views, size, 70, 2, CPU).render(np.arange(70), 0)
        with torch.inference_mode():
            for images in (batch.images, batch.images.flip(-1)):
                expected += share / 2 * torch.softmax(teacher(images).double(), dim=1)
    store = open_store(other_store)
    assert codes_differences(expected.log(), store.read_view(0)).max() < 1e-4
    assert [(teacher.size, teacher.weight) for teacher in store.manifest.teachers] == [(32, 3.0), (48, 1.0)]


def test_the_precision_is_the_recipes(inputs: Path, other_store: Path) -> None:
    recipe = write_recipe(inputs, "precision", LABEL)
    words = ("-m", "softshard.pipeline", "label", "--config", str(recipe), "--store", str(other_store))
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert (
        "expected no --mixed_precision, because results depend on it, found bf16; set `precision: bf16`" in done.stderr
    )
    assert label(label_recipe(inputs, ("store", str(other_store)), ("precision", "bf16"), ("views.count", "1")))
    logits = reference_logits(inputs, 1)[0].double()
    differences = codes_differences(logits, open_store(other_store).read_view(0))
    assert 1e-3 < differences.max() < 2
    assert differences.median() < 0.1


def test_compiled_teachers_give_the_same_labels(
    inputs: Path, other_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    changes = ("store", str(other_store)), ("compile", "true"), ("channels_last", "false"), ("views.count", "1")
    assert label(label_recipe(inputs, *changes))
    assert len(compiled) == 1
    differences = codes_differences(reference_logits(inputs, 1)[0].double(), open_store(other_store).read_view(0))
    assert differences.max() < 1e-4
