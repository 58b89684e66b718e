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
from small_runs import (
    LABEL,
    files_of,
    label_recipe,
    launch,
    make_inputs,
    pack_folder,
    write_digits,
    write_recipe,
    write_teacher,
)

from pipeline.beton import open_beton
from pipeline.errors import DataError, FormatError
from pipeline.label import label
from pipeline.loader import ViewLoader
from pipeline.store import open_store
from pipeline.topk import decode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="module")
def store_path(inputs: Path) -> Path:
    """A store labelled without interruption by one process."""
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
import pipeline.zarr_store as zarr_store
from pipeline.label import label
from pipeline.recipe import LabelRecipe
from pipeline.recipe_file import load_recipe
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


def test_labelling_goes_on_after_a_kill_and_ends_the_same(inputs: Path, store_path: Path, other_store: Path) -> None:
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
    done = launch("pipeline", "label", "--config", str(recipe), "--store", str(other_store))
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
