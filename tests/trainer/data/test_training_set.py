"""A store may be used in part: its first views, its most probable classes, its template where the loss wants it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_runs import label_recipe, make_inputs, pack_folder, train_recipe, write_digits

from softshard.pipeline.labels.label import label
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import decode
from softshard.trainer.data.soft_labels import EpochLabels, LabelReader
from softshard.trainer.data.training_set import open_training_set, open_validation_set
from softshard.trainer.loop.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("data"))
    assert label(label_recipe(folder, ("template", "{views: 2}")))
    return folder


def view_labels(inputs: Path, view: int, *changes: tuple[str, str]) -> EpochLabels:
    with LabelReader(open_training_set(train_recipe(inputs, *changes)).stores) as reader:
        labels = reader.labels(view, view)
    assert labels is not None
    return labels


def test_the_first_views_alone(inputs: Path) -> None:
    training = open_training_set(train_recipe(inputs, ("data.views", "2")))
    whole = open_training_set(train_recipe(inputs))
    assert [training.view(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    assert [whole.view(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]


def test_fewer_classes(inputs: Path) -> None:
    labels = view_labels(inputs, 1, ("data.top_k", "2"), ("loss.tail", "drop"))
    expected = open_store(inputs / "labels.zarr").read_view(1).top(2, 10)
    [(store, codes)] = labels.parts
    np.testing.assert_array_equal(codes.index, expected.index)
    [(weight, soft)] = labels.soft(np.array([3, 1]), 2.0, CPU)
    assert (weight, soft.probability.shape) == (1.0, (2, 2))
    assert store.template is None


@pytest.mark.parametrize("tail", ["spread", "lump", "drop"])
def test_soft_labels_lie_along_the_template_where_the_tail_is_spread(inputs: Path, tail: str) -> None:
    """The other losses do not look into the tail: along a template they would have a teacher of all classes for
    nothing."""
    labels = view_labels(inputs, 2, ("loss.tail", tail))
    store = open_store(inputs / "labels.zarr")
    rows = np.array([60, 3, 17])
    [(_, found)] = labels.soft(rows, 2.0, CPU)
    template = [torch.from_numpy(store.read_template()[rows])] if tail == "spread" else []
    expected = decode(*store.read_rows(2, rows).tensors(), 10, 2.0, *template)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0)
    [(part, _)] = labels.parts
    assert (part.template is None) == (not template)


@pytest.mark.parametrize("key", ["views", "top_k"])
def test_more_than_the_store_has(inputs: Path, key: str) -> None:
    with pytest.raises(DataError) as error:
        open_training_set(train_recipe(inputs, (f"data.{key}", "4")))
    assert str(error.value) == f"data.{key}: expected at most 3, as {inputs}/labels.zarr has, found 4; correct it"


def test_both_sets_have_as_many_classes_as_the_student(inputs: Path) -> None:
    write_digits(inputs / "three", 2)
    for digit in range(3, 10):
        shutil.rmtree(inputs / "three" / str(digit))
    pack_folder(inputs / "three", inputs / "three.beton")
    for name, open_set in (("train", open_training_set), ("validation", open_validation_set)):
        with pytest.raises(DataError) as error:
            open_set(train_recipe(inputs, (f"data.{name}", f"{inputs}/three.beton")))
        message = f"{inputs}/three.beton: expected 10 classes, as the student has, found 3; correct one"
        assert str(error.value) == message


def test_a_student_trains_along_the_template(inputs: Path) -> None:
    assert train(train_recipe(inputs, ("schedule.epochs", "2"), ("data.top_k", "2"), ("data.views", "2")))
    assert (inputs / "run" / "model.safetensors").exists()
