"""Golden probes: silent when pixels are the same, a warning for a little, an error for more."""

import base64
from pathlib import Path

import numpy as np
import pytest
from helpers.small_packs import pack_folder
from helpers.small_stores import make_manifest
from PIL import Image

import softshard.pipeline.views.golden
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import Probe, StoreManifest, library_versions
from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.views.golden import COUNT, check_probes, make_probes

VIEWS = ViewRecipe(seed=3, count=5)


def manifest(beton: Beton, probes: tuple[Probe, ...], **libraries: str) -> StoreManifest:
    changes = {"views": VIEWS, "probes": probes, "libraries": library_versions() | libraries}
    return make_manifest(samples=len(beton)).model_copy(update=changes)


@pytest.fixture(scope="module")
def probes(digits: Beton) -> tuple[Probe, ...]:
    return make_probes(digits, VIEWS, 32)


def change_pixels(monkeypatch: pytest.MonkeyPatch, change) -> None:
    render = softshard.pipeline.views.golden._render
    monkeypatch.setattr(softshard.pipeline.views.golden, "_render", lambda *arguments: change(render(*arguments)))


def test_probes_are_spread_over_images_and_views(digits: Beton, probes: tuple[Probe, ...]) -> None:
    rows = [digits.manifest.keys.index(probe.key) for probe in probes]
    assert len(probes) == COUNT
    assert np.diff(rows).min() >= len(digits) // COUNT
    assert {probe.view for probe in probes} == set(range(5))
    assert all(len(base64.b64decode(probe.thumbnail)) == 192 for probe in probes)


def test_probes_of_few_images(photos: Beton) -> None:
    probes = make_probes(photos, ViewRecipe(seed=0, count=100), 16)
    assert len({probe.key for probe in probes}) == len(photos) < COUNT


def test_the_same_pixels_are_silent(digits: Beton, probes: tuple[Probe, ...]) -> None:
    assert make_probes(digits, VIEWS, 32) == probes
    check_probes(digits, manifest(digits, probes), "store")


def test_one_step_in_one_pixel_is_a_warning_that_names_the_libraries(digits, probes, monkeypatch) -> None:
    def change(images: np.ndarray) -> np.ndarray:
        images[4, 7, 7, 1] ^= 1
        return images

    change_pixels(monkeypatch, change)
    then = manifest(digits, probes, **{"libjpeg-turbo": "1.5.0"})
    message = (
        rf"store: expected the pixels that were labeled, found others in 1 of 32 golden probes, such as view "
        rf"{probes[4].view} of {probes[4].key}; they differ by 0\.0\d\d of 255 on average; "
        rf"libjpeg-turbo 1\.5\.0 then and \d+\.\d+\.\d+ now$"
    )
    with pytest.warns(UserWarning, match=message):
        check_probes(digits, then, "store")


@pytest.mark.parametrize("step", [1, -1, 60])
def test_a_whole_step_everywhere_is_an_error(digits, probes, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on gray images, whose thumbnails all have room in both directions."""
    change_pixels(monkeypatch, lambda images: np.full_like(images, 100))
    gray = make_probes(digits, VIEWS, 32)
    change_pixels(monkeypatch, lambda images: np.full_like(images, 100 + step))
    message = rf"differ by {abs(step)}\.000 of 255 .*; the libraries are the same, .*; use the libraries that labeled"
    with pytest.raises(DataError, match=message):
        check_probes(digits, manifest(digits, gray), "store")


def test_a_part_of_the_images_is_enough(digits: Beton, digit_folder: Path, probes, tmp_path: Path, monkeypatch) -> None:
    keys = [probe.key for probe in probes][3:9]
    subset = packed_part(digit_folder, keys, tmp_path)
    check_probes(subset, manifest(digits, probes), "store")
    change_pixels(monkeypatch, lambda images: images ^ 128)
    with pytest.raises(DataError, match="found others in 6 of 6 golden probes"):
        check_probes(subset, manifest(digits, probes), "store")


def test_no_probe_among_the_images_is_a_warning(digits: Beton, digit_folder: Path, probes, tmp_path: Path) -> None:
    others = sorted(set(digits.manifest.keys) - {probe.key for probe in probes})[:4]
    subset = packed_part(digit_folder, others, tmp_path)
    with pytest.warns(UserWarning, match="found none; whether pixels are those that were labeled is not checked"):
        check_probes(subset, manifest(digits, probes), "store")


def packed_part(folder: Path, keys: list[str], tmp_path: Path) -> Beton:
    for key in keys:
        (tmp_path / "part" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "part" / key).write_bytes((folder / key).read_bytes())
    return pack_folder(tmp_path / "part")[1]


@pytest.mark.parametrize("thumbnail", ["", "AAAA", "not base64!"])
def test_a_thumbnail_of_another_size_is_refused(thumbnail: str) -> None:
    with pytest.raises(ValueError, match="thumbnail"):
        Probe(key="a", view=0, size=32, digest="0", thumbnail=thumbnail)


def test_thumbnails_are_the_views_in_small(digits: Beton, probes: tuple[Probe, ...]) -> None:
    [pixels] = softshard.pipeline.views.golden._render(digits, VIEWS, np.array([0]), np.array([probes[0].view]), 32)
    blocks = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    recorded = np.frombuffer(base64.b64decode(probes[0].thumbnail), np.uint8).reshape(8, 8, 3)
    assert np.abs(blocks - recorded).max() <= 1
    assert np.array_equal(np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BOX)), recorded)
