"""Stores joined to images: by key, in part, several at once; and read ahead of their use."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_runs import label_recipe, pack_folder, train_recipe, write_digits, write_teacher

import softshard.pipeline.views.golden
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.pack import pack
from softshard.pipeline.labels.label import label
from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.store import open_store
from softshard.trainer.data.soft_labels import LabelReader, teacher_classes
from softshard.trainer.data.training_set import TrainingSet, open_training_set
from softshard.trainer.loop.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def more(inputs: Path) -> Path:
    """The labeled images and ten more."""
    write_digits(inputs / "more", 8)
    shutil.copytree(inputs / "train", inputs / "more", dirs_exist_ok=True)
    pack_folder(inputs / "more", inputs / "more.beton")
    return inputs / "more.beton"


@pytest.fixture(scope="module")
def second(inputs: Path) -> Path:
    """Labels of the same views by another teacher, of more classes and with a template."""
    write_teacher(inputs / "teacher two", seed=1)
    store = inputs / "second.zarr"
    changes = ("teachers.0.model", f"local-dir:{inputs}/teacher two"), ("top_k", "5"), ("template", "{views: 2}")
    assert label(label_recipe(inputs, *changes, ("store", str(store))))
    return store


def both(inputs: Path, second: Path) -> tuple[str, str]:
    return "data.labels", f"[{{store: '{inputs}/labels.zarr'}}, {{store: '{second}', weight: 3}}]"


def labels_of(training: TrainingSet, view: int):
    with LabelReader(training.stores) as reader:
        labels = reader.labels(view, view)
    assert labels is not None
    return labels


def refused(inputs: Path, *changes: tuple[str, str]) -> str:
    """The message with which a recipe's labels are refused."""
    with pytest.raises(DataError) as error:
        open_training_set(train_recipe(inputs, *changes))
    return str(error.value)


def test_labels_are_joined_by_key_not_by_position(inputs: Path) -> None:
    """A subset, packed by itself, gets the labels of its images."""
    subset = inputs / "subset"
    for digit in (3, 1):
        shutil.copytree(inputs / "train" / str(digit), subset / str(digit))
    (inputs / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    source = SourceRecipe(kind="imagefolder", path=str(subset))
    pack(PackRecipe(source=source, classes=str(inputs / "classes.txt"), output=str(inputs / "subset.beton")))
    whole = open_training_set(train_recipe(inputs))
    part = open_training_set(train_recipe(inputs, ("data.train", str(inputs / "subset.beton")), ("batch_size", "2")))
    keys = list(whole.beton.manifest.keys)
    rows = np.array([keys.index(key) for key in part.beton.manifest.keys])
    assert len(rows) == 14
    [(_, one)] = labels_of(whole, 0).soft(rows, 2.0, CPU)
    [(_, two)] = labels_of(part, 0).soft(np.arange(14), 2.0, CPU)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.probability, two.probability)


class TestJoin:
    def test_rows_without_labels_are_counted_and_named(self, inputs: Path, more: Path) -> None:
        assert refused(inputs, ("data.train", str(more))) == (
            f"{inputs}/labels.zarr: expected labels for all 80 images of {more}, found none for 10, such as 0/7.jpg, "
            "1/7.jpg, 2/7.jpg and 7 more; label them, or leave them out with data.missing_labels: skip"
        )

    def test_the_recipe_may_leave_them_out(self, inputs: Path, more: Path) -> None:
        changes = ("data.train", str(more)), ("data.missing_labels", "skip")
        training = open_training_set(train_recipe(inputs, *changes))
        keys = {training.beton.manifest.keys[row] for row in training.rows}
        assert keys == set(open_beton(inputs / "train.beton").manifest.keys)
        assert (training.stores[0].rows[training.rows] >= 0).all()

    def test_labels_of_other_images_are_refused(self, inputs: Path) -> None:
        write_digits(inputs / "changed", 7, first=20)
        pack_folder(inputs / "changed", inputs / "changed.beton")
        assert refused(inputs, ("data.train", str(inputs / "changed.beton"))) == (
            f"{inputs}/labels.zarr: expected labels of the images in {inputs}/changed.beton, found labels of other "
            "images under 70 of the keys, such as 0/0.jpg, 0/1.jpg, 0/2.jpg and 67 more; label these images, or take "
            "the .beton that was labeled"
        )

    def test_labels_of_another_class_list_are_refused(self, inputs: Path) -> None:
        for digit in range(10):
            shutil.copytree(inputs / "train" / str(digit), inputs / "renamed" / f"digit {digit}")
        pack_folder(inputs / "renamed", inputs / "renamed.beton")
        assert refused(inputs, ("data.train", str(inputs / "renamed.beton"))) == (
            f"{inputs}/labels.zarr: expected labels of the class list of {inputs}/renamed.beton, found those of "
            "another; label these images, or pack them with the same `classes` file"
        )

    def test_pixels_that_are_no_longer_those_that_were_labeled(self, inputs: Path, monkeypatch) -> None:
        render = softshard.pipeline.views.golden._render
        monkeypatch.setattr(softshard.pipeline.views.golden, "_render", lambda *arguments: render(*arguments) ^ 255)
        message = (
            rf"^{inputs}/labels.zarr: expected the pixels that were labeled, found others in 32 of 32 golden probes, "
            r"such as view 0 of 0/0.jpg; they differ by \d+\.\d{3} of 255 on average; the libraries are the same, so "
            r"the processor or the code of this project differs; use the libraries that labeled it, or label again$"
        )
        with pytest.raises(DataError, match=message):
            open_training_set(train_recipe(inputs))
        with pytest.raises(DataError, match=message):
            label(label_recipe(inputs))

    def test_views_that_mix_need_the_whole_set(self, inputs: Path) -> None:
        store, part = inputs / "mixed.zarr", inputs / "part"
        mixing = ("views.mixup", "{alpha: 0.4}"), ("views.cutmix", "{alpha: 1.0}"), ("views.rand_augment", "{}")
        assert label(label_recipe(inputs, *mixing, ("store", str(store))))
        shutil.copytree(inputs / "train", part)
        (part / "3/2.jpg").unlink()
        pack_folder(part, inputs / "part.beton")
        changes = ("data.labels", str(store)), ("schedule.epochs", "2"), ("output", str(inputs / "mixed"))
        assert refused(inputs, *changes, ("data.train", str(inputs / "part.beton"))) == (
            f"{store}: expected all 70 labeled images in {inputs}/part.beton, because views that mix images depend on "
            "the whole set, found 69; pack them all, or label these"
        )
        assert train(train_recipe(inputs, *changes))


class TestUnfinished:
    """Of three blocks in each of three views."""

    @pytest.fixture
    def store(self, inputs: Path, tmp_path: Path) -> Path:
        shutil.copytree(inputs / "labels.zarr", tmp_path / "unfinished.zarr")
        return tmp_path / "unfinished.zarr"

    def test_the_first_view_with_a_gap_is_named(self, inputs: Path, store: Path) -> None:
        for gap in ("1/1", "2/0", "2/2"):
            (store / "block_digest/c" / gap).unlink()
        assert refused(inputs, ("data.labels", str(store))) == (
            f"{store}: expected all 3 blocks labeled in each of the 3 views to train on, found 2 in view 1; finish "
            "labeling, or train on fewer views with data.views: 1"
        )

    def test_as_many_views_as_the_message_says_train(self, inputs: Path, store: Path, tmp_path: Path) -> None:
        (store / "block_digest/c/2/0").unlink()
        changes = ("data.labels", str(store)), ("output", str(tmp_path / "run"))
        assert refused(inputs, *changes).endswith(" with data.views: 2")
        assert train(train_recipe(inputs, *changes, ("data.views", "2")))

    def test_no_views_are_left_without_the_first(self, inputs: Path, store: Path) -> None:
        for gap in ("0/0", "0/1", "0/2"):
            (store / "block_digest/c" / gap).unlink()
        assert refused(inputs, ("data.labels", str(store)), ("data.views", "2")) == (
            f"{store}: expected all 3 blocks labeled in each of the 2 views to train on, found 0 in view 0; finish "
            "labeling"
        )

    def test_fewer_epochs_than_views_need_the_first_views_alone(
        self, inputs: Path, store: Path, tmp_path: Path
    ) -> None:
        (store / "block_digest/c/2/2").unlink()
        changes = ("data.labels", str(store)), ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))
        assert train(train_recipe(inputs, *changes))


class TestSeveralStores:
    def test_each_has_its_own_codes_and_weight(self, inputs: Path, second: Path) -> None:
        training = open_training_set(train_recipe(inputs, both(inputs, second)))
        one, two = labels_of(training, 1).soft(np.array([5, 60]), 2.0, CPU)
        assert (one[0], two[0]) == (1.0, 3.0)
        assert (one[1].index.shape, two[1].index.shape) == ((2, 3), (2, 5))
        assert one[1].tail_distribution is None
        assert two[1].tail_distribution is not None

    def test_the_teachers_vote_by_weight(self, inputs: Path, second: Path) -> None:
        training = open_training_set(train_recipe(inputs, both(inputs, second)))
        one, two = training.stores
        rows = np.arange(70)
        first = open_store(inputs / "labels.zarr").read_view(0).index[:, 0]
        assert (teacher_classes([one], 0, rows) == first).all()
        alone = teacher_classes([two], 0, rows)
        assert (teacher_classes([one, replace(two, weight=1000.0)], 0, rows) == alone).all()
        assert (first != alone).any()

    def test_they_train_together(self, inputs: Path, second: Path, tmp_path: Path) -> None:
        changes = both(inputs, second), ("schedule.epochs", "2"), ("output", str(tmp_path / "run"))
        assert train(train_recipe(inputs, *changes))

    def test_other_views_are_refused(self, inputs: Path) -> None:
        other = inputs / "other views.zarr"
        assert label(label_recipe(inputs, ("views.seed", "2"), ("store", str(other))))
        assert refused(inputs, both(inputs, other)) == (
            f"{other}: expected the views of {inputs}/labels.zarr, since one batch of pixels gets the labels of "
            "both, found others: views.seed: expected 1, found 2; label the same views with each teacher"
        )

    def test_the_shortest_decides_how_many_views_there_are(self, inputs: Path) -> None:
        fewer = inputs / "fewer.zarr"
        assert label(label_recipe(inputs, ("views.count", "2"), ("store", str(fewer))))
        assert open_training_set(train_recipe(inputs, both(inputs, fewer))).views.count == 2


class TestReader:
    def test_the_coming_view_is_read_while_this_one_is_used(self, inputs: Path) -> None:
        training, read = open_training_set(train_recipe(inputs)), []
        began = threading.Event()

        class Watched(type(training.stores[0])):
            def read_view(self, view: int):
                read.append((view, threading.current_thread().name))
                if view == 1:
                    began.set()
                return super().read_view(view)

        stores = [Watched(**vars(labels)) for labels in training.stores]
        with LabelReader(stores) as reader:
            first = reader.labels(0, 1)
            assert began.wait(10)
            second = reader.labels(1, 2)
            third = reader.labels(2, 2)
            assert reader.labels(2, 2) is third
        assert [view for view, _ in read] == [0, 1, 2]
        assert {name for _, name in read} == {"labels_0"}
        for view, labels in enumerate((first, second, third)):
            assert labels is not None
            [(_, codes)] = labels.parts
            np.testing.assert_array_equal(codes.index, open_store(inputs / "labels.zarr").read_view(view).index)

    def test_damage_in_a_view_read_ahead_is_an_error_when_it_is_used(self, inputs: Path, tmp_path: Path) -> None:
        store = tmp_path / "damaged.zarr"
        shutil.copytree(inputs / "labels.zarr", store)
        chunk = store / "topk_index/c/1/0/0"
        chunk.write_bytes(bytes(byte ^ 1 for byte in chunk.read_bytes()))
        training = open_training_set(train_recipe(inputs, ("data.labels", str(store))))
        with LabelReader(training.stores) as reader:
            assert reader.labels(0, 1) is not None
            message = (
                rf"^{store}: view 1, block 0: topk_index: expected intact chunks, found: .+; "
                rf"delete {store}/block_digest/c/1/0 and label again$"
            )
            with pytest.raises(FormatError, match=message):
                reader.labels(1, 2)

    def test_hard_labels_alone_read_nothing(self) -> None:
        with LabelReader([]) as reader:
            assert reader.labels(0, 1) is None
