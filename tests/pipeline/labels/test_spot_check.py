"""Labeling a sample again: silent when the labels are the teacher's, a line for each that is not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_runs import LABEL, label_recipe, make_inputs, write_recipe
from helpers.small_stores import block_digest, plain_array, template_digest
from hypothesis import given, settings
from hypothesis import strategies as st

from softshard.pipeline.__main__ import main
from softshard.pipeline.labels.label import label
from softshard.pipeline.labels.spot_check import codes_differences, spot_check
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import Codes, encode

TEMPLATE = ("template", "{views: 2}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("spot_check"))
    assert label(label_recipe(folder, TEMPLATE))
    return folder


@pytest.fixture
def other(inputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs / "labels.zarr", tmp_path / "labels.zarr"))


def write(path: Path, view: int, block: int, codes: Codes) -> None:
    """Replace a block's codes, with a digest that fits them."""
    rows = open_store(path).rows(block)
    for name, values in (("topk_index", codes.index), ("topk_gap", codes.gap), ("tail", codes.tail)):
        plain_array(path, name)[view, rows] = values
    plain_array(path, "block_digest")[view, block] = block_digest(view, block, codes)


def test_the_teachers_own_labels_are_whole(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(inputs, "label", LABEL)
    words = (
        "verify",
        str(inputs / "labels.zarr"),
        "--sample",
        "50",
        "--config",
        str(recipe),
        "--template",
        "{views: 2}",
    )
    assert main(words) == 0
    assert "50 views labeled again, 0.0" in capsys.readouterr().out


def test_labels_of_another_view_are_found(inputs: Path, other: Path) -> None:
    store = open_store(other)
    for block in range(store.blocks):
        write(other, 2, block, store.read_block(1, block))
    report = spot_check(label_recipe(inputs, TEMPLATE, ("store", str(other))), 60, 0)
    assert len(report.problems) > 10
    assert all("labels.zarr: view 2 of " in problem for problem in report.problems)


def test_a_template_of_other_images_is_found(inputs: Path, other: Path) -> None:
    store = open_store(other)
    for block in range(store.blocks):
        wrong = store.read_template(block)[::-1]
        plain_array(other, "tail_template")[store.rows(block)] = wrong
        plain_array(other, "template_digest")[block] = template_digest(block, wrong)
    report = spot_check(label_recipe(inputs, TEMPLATE, ("store", str(other))), 20, 0)
    assert report.problems
    assert all("tail template of" in problem for problem in report.problems)


def test_the_two_options_go_together(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(inputs / "labels.zarr"), "--sample", "5"]) == 2
    assert "expected --sample N together with --config F" in capsys.readouterr().err


@given(st.integers(0, 10**6), st.integers(2, 20), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_codes_of_the_logits_themselves_are_no_difference(seed: int, classes: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    k = data.draw(st.integers(1, classes))
    codes = encode(logits, k)
    assert codes_differences(logits, codes).max() < 1e-9
    shifted = logits.clone()
    shifted[:, int(codes.index[0, 0])] += 1.0
    assert codes_differences(shifted, codes)[0] > 0.4


def test_a_more_probable_class_that_was_not_kept_is_a_difference() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    codes = Codes(np.array([[0, 2]], np.uint16), np.array([[32]], np.uint8), encode(logits, 2).tail)
    assert codes_differences(logits, codes).item() >= 1.0
