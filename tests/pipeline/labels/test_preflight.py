"""The look at a few views: its figures are those of the labels, its time that of the work."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from helpers.small_runs import label_recipe, make_inputs

import softshard.pipeline.labels.preflight
from softshard.pipeline.labels.label import label, make_labeler
from softshard.pipeline.labels.labeler import LabeledBatch, Labeler
from softshard.pipeline.labels.preflight import Preflight, _duration, preflight
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import decode


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("survey"))


def test_the_figures_are_those_of_the_labels(inputs: Path) -> None:
    recipe = label_recipe(inputs, ("views.count", "1"), ("template", "{views: 1}"), ("block_rows", "70"))
    labeler, manifest = make_labeler(recipe, Accelerator(cpu=True))
    found = preflight(labeler, manifest)
    assert label(recipe)
    store = open_store(recipe.store)
    soft = decode(*store.read_view(0).tensors(), 10, 1.0)
    assert found.images == 70
    assert found.confidence == pytest.approx(float(soft.probability[:, 0].mean()), abs=0.01)
    assert found.tail == pytest.approx(float(soft.tail.mean()), abs=0.01)
    right = soft.index[:, 0].numpy() == labeler.beton.labels
    assert found.top1 == pytest.approx(100 * right.mean(), abs=2)
    assert found.bytes_per_view == pytest.approx(store.bytes_per_view(), rel=0.02)
    assert found.template_bytes == pytest.approx(store.stored_bytes()["tail_template"] / 70, rel=0.02)
    assert found.stored_bytes(manifest, 1) >= sum(store.stored_bytes().values())


def test_the_first_batch_is_not_timed(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 images in batches of 16: on this clock 0.6 seconds for the first batch, then 0.01 for each image."""
    labeler, manifest = make_labeler(label_recipe(inputs), Accelerator(cpu=True))
    labels, calls, clock = Labeler.labels, [], [0.0]

    def slow(self, rows: np.ndarray, views: np.ndarray, template: bool) -> Iterator[LabeledBatch]:
        clock[0] += 0.01 * len(rows) if calls else 0.6
        calls.append(len(rows))
        return labels(self, rows, views, template)

    monkeypatch.setattr(Labeler, "labels", slow)
    monkeypatch.setattr(softshard.pipeline.labels.preflight, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = preflight(labeler, manifest)
    assert calls == [16, 54]
    assert found.seconds == pytest.approx(0.01)


def test_durations_and_bytes_of_a_large_run(inputs: Path) -> None:
    assert [_duration(seconds) for seconds in (5, 300, 9000, 300_000)] == [
        "5 seconds", "5.0 minutes", "2.5 hours", "3.5 days",
    ]  # fmt: skip
    found = Preflight(512, 84.0, 0.7, 0.1, 18.0, 500.0, 0.001)
    _, manifest = make_labeler(label_recipe(inputs), Accelerator(cpu=True))
    manifest = manifest.model_copy(update={"samples": 1_000_000, "block_rows": 32768})
    assert found.stored_bytes(manifest, 300) == 5_900_000_000 + 300 * 31 * 4 * 4096
