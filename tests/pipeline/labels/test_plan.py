"""The plan of the work, on stores of every state."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from helpers.small_runs import label_recipe, make_inputs

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.labels.label import label
from softshard.pipeline.labels.labeler import make_labeler
from softshard.pipeline.labels.plan import WorkUnit, count_views, plan_work, rows_of_block, wanted_views
from softshard.pipeline.store.store import open_store

TEMPLATE = ("template", "{views: 2}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("plan"))


def manifest_of(inputs: Path, *changes: tuple[str, str]) -> StoreManifest:
    return make_labeler(label_recipe(inputs, *changes), Accelerator(cpu=True))[1]


def test_wanted_views_ascend_each_once(inputs: Path) -> None:
    assert wanted_views(label_recipe(inputs), None) == range(3)
    assert wanted_views(label_recipe(inputs), [2, 0, 2]) == [0, 2]
    assert wanted_views(label_recipe(inputs, TEMPLATE), [2]) == [2]
    assert wanted_views(label_recipe(inputs, TEMPLATE), [1, 2, 0]) == [0, 1, 2]


def test_without_a_store_everything_is_missing(inputs: Path) -> None:
    units = plan_work(manifest_of(inputs), range(3), None)
    assert units == [WorkUnit(range(view, view + 1), block) for view in range(3) for block in range(3)]
    assert plan_work(manifest_of(inputs), [2], None) == units[6:]


def test_the_views_of_a_template_are_planned_together(inputs: Path) -> None:
    manifest = manifest_of(inputs, TEMPLATE)
    template = [WorkUnit(range(2), block) for block in range(3)]
    others = [WorkUnit(range(2, 3), block) for block in range(3)]
    assert plan_work(manifest, range(3), None) == template + others
    assert plan_work(manifest, [2], None) == others
    assert plan_work(manifest, [0, 1], None) == template


def test_what_is_labeled_is_left_out(inputs: Path) -> None:
    at = ("store", str(inputs / "part.zarr"))
    assert label(label_recipe(inputs, TEMPLATE, at), [2])
    store = open_store(inputs / "part.zarr")
    assert plan_work(store.manifest, range(3), store) == [WorkUnit(range(2), block) for block in range(3)]
    assert plan_work(store.manifest, [2], store) == []
    larger = manifest_of(inputs, TEMPLATE, ("views.count", "4"))
    assert plan_work(larger, [2, 3], store) == [WorkUnit(range(3, 4), block) for block in range(3)]


def test_the_views_of_units_are_counted_by_image(inputs: Path) -> None:
    assert label(label_recipe(inputs, ("store", str(inputs / "whole.zarr"))))
    store = open_store(inputs / "whole.zarr")
    assert np.concatenate([rows_of_block(store, block) for block in range(3)]).tolist() == list(range(70))
    assert count_views(store, [WorkUnit(range(3), block) for block in range(3)]) == 210
    assert count_views(store, [WorkUnit(range(1), 2)]) == 70 - 2 * 24
