"""What a user imports from `softshard`: every name is there when it is used, and verbs take models, data and files."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_loaders import CPU, RICH
from helpers.small_packs import contents
from helpers.small_runs import label_recipe, train_recipe

import softshard
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.runtime.errors import RecipeError


def test_importing_takes_nothing_along() -> None:
    code = "import os, sys; before = dict(os.environ); import softshard\n"
    code += "print('numpy' in sys.modules, before == os.environ)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


@pytest.mark.parametrize("name", softshard.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(softshard, name)
    assert value.__name__ == name
    assert value.__doc__
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_editors_see_the_same_names() -> None:
    source = Path(softshard.__file__).read_text()
    declared = [line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from softshard")]
    assert sorted(declared) == softshard.__all__
    assert set(softshard.__all__) <= set(dir(softshard))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'softshard' has no attribute 'labell'"):
        _ = softshard.labell


def test_packing_plain_data_and_files(root: Path, tmp_path: Path) -> None:
    recipe = {"source": {"kind": "imagefolder", "path": str(root)}, "output": str(tmp_path / "a.beton")}
    manifest = softshard.pack(recipe)
    assert len(manifest.keys) == 4
    (tmp_path / "pack.yaml").write_text(f"source: {{kind: imagefolder, path: {root}}}\noutput: {tmp_path}/b.beton\n")
    assert softshard.pack(tmp_path / "pack.yaml").keys == manifest.keys
    files = contents(tmp_path)
    assert files["a.beton"] == files["b.beton"]


def test_plain_data_that_is_wrong() -> None:
    with pytest.raises(RecipeError) as error:
        softshard.pack({"source": {"kind": "folder"}, "outptu": "x"})
    lines = str(error.value).splitlines()
    assert "PackRecipe: source.path: missing key" in lines
    assert 'PackRecipe: outptu: unknown key; near: output (got "x")' in lines


def test_rendering(photos: Beton) -> None:
    loader = softshard.ViewLoader(photos, RICH, 32, 3, 1, CPU)
    views = RICH.model_dump()
    pixels = softshard.render(photos.path, views, [2, 0, 5], [1, 7], 32)
    assert (pixels.shape, pixels.dtype) == ((3, 2, 32, 32, 3), np.uint8)
    for place, number in enumerate((1, 7)):
        [expected] = [batch.images.clone() for batch in loader.render(np.array([2, 0, 5]), number)]
        assert torch.equal(torch.from_numpy(pixels[:, place]), expected.movedim(1, -1))


def test_labels_training_evaluation_and_export(inputs: Path, tmp_path: Path) -> None:
    store = tmp_path / "labels.zarr"
    recipe = label_recipe(inputs, ("store", str(store)))
    assert softshard.label(recipe, range(2))
    assert softshard.label(recipe.model_dump(mode="json"))
    assert (softshard.open_store(store).digests() != 0).all()
    changes = ("output", str(tmp_path / "run")), ("data.labels", str(store)), ("schedule.epochs", "2")
    training = train_recipe(inputs, *changes)
    assert softshard.train(training.model_dump(mode="json"))
    softshard.export(tmp_path / "run", tmp_path / "out")
    branched = softshard.evaluate(training, tmp_path / "run/model.safetensors")
    folded = softshard.evaluate(training, tmp_path / "out")
    assert branched.predictions == folded.predictions
