"""Showing: the JSON document says everything, the summary fits on a screen."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.small_packs import contents, encoded, pack_folder
from helpers.small_stores import create, fill, make_manifest
from PIL import Image

from softshard.pipeline.__main__ import main
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.recipes.recipe import PackRecipe
from softshard.pipeline.show import _coverage


def shown(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["show", str(path), *options]) == 0
    return capsys.readouterr().out


def test_a_packed_file_for_programs(photos: Beton, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(photos.path, capsys, "--json"))
    assert document["kind"] == "beton"
    assert (document["images"], document["bytes"]) == (22, photos.path.stat().st_size)
    assert document["classes"] == [{"name": "flower", "images": 11}, {"name": "temple", "images": 11}]
    assert document["width"] == {"min": 1, "median": np.median(photos.widths), "max": 640}
    assert document["height"] == {"min": 1, "median": np.median(photos.heights), "max": 427}
    assert document["image_bytes"]["max"] == photos.lengths.max()
    assert (document["converted"], document["skipped"]) == ({}, [])
    assert PackRecipe.model_validate_json(json.dumps(document["recipe"])) == photos.manifest.recipe
    assert document["libraries"] == photos.manifest.libraries


def test_a_packed_file_for_people(root: Path, photographs: list[Image.Image], capsys) -> None:
    (root / "a" / "odd.png").write_bytes(encoded(photographs[0].crop((0, 0, 300, 20)), "PNG"))
    (root / "b" / "bad.jpg").write_bytes(b"")
    _, beton = pack_folder(root, on_bad_image="skip")
    lines = dict(line.split(maxsplit=1) for line in shown(beton.path, capsys).splitlines() if line[0] != " ")
    assert lines["images"].startswith("5 in ")
    assert lines["width"] == "90 to 300, median 91"
    assert lines["classes"] == "2; images in each: 2 to 3, median 2.5"
    assert lines["converted"] == "1 png"
    assert lines["skipped"] == "1: b/bad.jpg"
    assert lines["recipe.source.kind"] == "imagefolder"
    assert "ffcv" in lines["libraries"]


def test_a_thousand_classes_fit_on_a_screen(root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "names").write_text("\n".join(["a", "b", *(f"class {number}" for number in range(998))]))
    _, beton = pack_folder(root, classes=str(tmp_path / "names"))
    summary = shown(beton.path, capsys)
    assert "1000; images in each: 0 to 2, median 0" in summary
    assert "a (2), b (2), class 0 (0), class 1 (0), class 2 (0) and 995 more" in summary
    assert len(summary.splitlines()) < 30
    assert len(json.loads(shown(beton.path, capsys, "--json"))["classes"]) == 1000


def test_a_store_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_manifest()
    store = create(tmp_path / "labels.zarr", manifest)
    fill(store, [(0, 0), (0, 1), (0, 2), (1, 1)])
    document = json.loads(shown(Path(store.name), capsys, "--json"))
    assert (document["kind"], document["blocks"], document["coverage"]) == ("store", 3, [3, 1])
    assert document["manifest"] == manifest.model_dump(mode="json")
    assert document["bytes"] == store.stored_bytes()
    assert document["bytes_per_view"] == store.bytes_per_view()


def test_a_store_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = create(tmp_path / "labels.zarr", make_manifest())
    fill(store, [(0, 0), (0, 1), (0, 2), (1, 1)])
    before = contents(Path(store.name))
    summary = shown(Path(store.name), capsys)
    assert "top 3 of 7 classes, 10 images" in summary
    assert "view 0: whole\n" in summary
    assert "view 1: 1 of 3 blocks\n" in summary
    assert "teacher.model resnet10t" in summary
    assert contents(Path(store.name)) == before


def test_coverage_of_many_views_is_short() -> None:
    assert _coverage([40] * 12 + [3] + [0] * 287, 40) == [
        "views 0-11: whole",
        "view 12: 3 of 40 blocks",
        "views 13-299: not labeled",
    ]


@pytest.mark.parametrize("name", ["none.beton", "empty.beton", ""])
def test_nothing_to_show(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.beton").write_bytes(b"")
    assert main(["show", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
