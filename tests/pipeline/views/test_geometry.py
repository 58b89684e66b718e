import itertools
import math

import numpy as np
import pytest
import timm.data
import torch
from helpers.draw_checks import uncompiled
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from softshard.pipeline.recipes.recipe import CropRecipe, ViewRecipe
from softshard.pipeline.views import geometry
from softshard.pipeline.views.geometry import CENTER, view_geometry
from softshard.pipeline.views.kernels.rng import ONE, draw_below, stream
from softshard.pipeline.views.parameters import center_fraction, view_parameters

RECIPE = ViewRecipe(seed=7, count=100)
PARAMETERS = view_parameters(RECIPE)
# (key, view, height, width) -> (top, left, height, width, flip): a change of these changes every store made before
FROZEN = {
    (0, 0, 375, 500): (107, 257, 142, 169, 1),
    (1, 0, 375, 500): (0, 29, 373, 334, 0),
    (18446744073709551615, 0, 375, 500): (75, 154, 143, 154, 1),
    (0, 1, 375, 500): (47, 31, 318, 320, 1),
    (0, 99, 500, 375): (17, 4, 303, 365, 0),
    (123456789, 12, 224, 224): (56, 41, 95, 76, 1),
    (5, 3, 28, 28): (3, 6, 25, 20, 1),
    (5, 4, 1, 1): (0, 0, 1, 1, 0),
    (77, 8, 3000, 4000): (246, 1244, 2050, 2725, 0),
    (0, -1, 375, 500): (0, 62, 375, 375, 0),
}
KEYS = st.integers(0, 2**64 - 1)
SIDES = st.integers(1, 5000)


def box_of(key: int, view: int, height: int, width: int, parameters=PARAMETERS) -> tuple[int, int, int, int, bool]:
    top, left, box_height, box_width, flip = view_geometry(
        parameters, np.uint64(key), view, np.int64(height), np.int64(width)
    )
    return int(top), int(left), int(box_height), int(box_width), bool(flip)


def boxes(recipe: ViewRecipe, count: int, height: int = 1000, width: int = 1000) -> np.ndarray:
    parameters = view_parameters(recipe)
    return np.array([box_of(key, 0, height, width, parameters) for key in range(count)])


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_views(case: tuple[int, int, int, int]) -> None:
    assert tuple(map(int, box_of(*case))) == FROZEN[case]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(KEYS, st.integers(0, 10**6), SIDES, SIDES)
def test_boxes_lie_inside_the_image(key: int, view: int, height: int, width: int) -> None:
    top, left, box_height, box_width, _ = box_of(key, view, height, width)
    assert top >= 0
    assert left >= 0
    assert 1 <= box_height <= height - top
    assert 1 <= box_width <= width - left


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    KEYS,
    SIDES,
    SIDES,
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
)
def test_boxes_of_every_legal_recipe_lie_inside(key: int, height: int, width: int, scale, ratio) -> None:
    low, high = sorted(ratio)
    crop = CropRecipe(scale=tuple(sorted(scale)), ratio=(low, high))
    top, left, box_height, box_width, _ = box_of(
        key, 0, height, width, view_parameters(ViewRecipe(seed=0, count=1, crop=crop))
    )
    assert min(top, left) >= 0
    assert 1 <= box_height <= height - top
    assert 1 <= box_width <= width - left


def test_seed_key_and_view_each_change_the_view() -> None:
    other_seed = view_parameters(ViewRecipe(seed=8, count=100))
    views = {
        box_of(1, 1, 500, 400),
        box_of(2, 1, 500, 400),
        box_of(1, 2, 500, 400),
        box_of(1, 1, 500, 400, other_seed),
    }
    assert len(views) == 4


def test_compiled_parameters_equal_uncompiled_ones() -> None:
    """No fused or reordered floating point, no other integers: Python's own arithmetic gives the same geometry."""
    recipes = [CropRecipe(), CropRecipe(scale=(0.9, 1.0), ratio=(0.1, 7.0)), None]
    parameters = [view_parameters(ViewRecipe(seed=2**64 - 1, count=1, crop=crop)) for crop in recipes]
    sizes = [(375, 500), (4000, 6000), (33, 1000), (1, 1)]
    cases = list(itertools.product([0, 3, 2**63, 2**64 - 1], [0, 1, 99, CENTER], sizes, parameters))
    compiled = [box_of(key, view, *size, parameters) for key, view, size, parameters in cases]
    with uncompiled():
        for (key, view, (height, width), parameters), expected in zip(cases, compiled, strict=True):
            found = geometry.view_geometry(parameters, np.uint64(key), view, np.int64(height), np.int64(width))
            assert tuple(found) == expected


@pytest.mark.parametrize(
    ("height", "width", "tries"),
    [(500, 500, [0, 1, 2, 3]), (20, 2000, [word for attempt in range(10) for word in (4 * attempt, 4 * attempt + 1)])],
)
def test_every_decision_reads_its_own_word(height: int, width: int, tries: list[int]) -> None:
    """A crop that fits at once, and one that never does: ten tries of two words each. The flip's word is fixed."""
    words: list[int] = []
    with uncompiled() as patch:
        patch.setattr(geometry, "draw_below", lambda state, number, bound: words.append(number) or bound // 2)
        geometry.view_geometry(PARAMETERS, np.uint64(0), 0, np.int64(height), np.int64(width))
    assert words == [*tries, 64]


def test_area_is_uniform_and_log_aspect_is_uniform() -> None:
    found = boxes(ViewRecipe(seed=1, count=1, crop=CropRecipe(scale=(0.08, 0.5), ratio=(0.75, 4 / 3))), 4000)
    area, aspect = found[:, 2] * found[:, 3] / 1e6, np.log(found[:, 3] / found[:, 2])
    for values, low, high in ((area, 0.08, 0.5), (aspect, math.log(0.75), math.log(4 / 3))):
        quantiles = (np.sort(values) - low) / (high - low)
        distance = np.abs(quantiles - np.arange(4000) / 4000).max()
        assert distance < 1.95 / math.sqrt(4000), "Kolmogorov-Smirnov, p = 0.001"


def test_positions_are_uniform() -> None:
    found = boxes(ViewRecipe(seed=2, count=1, crop=CropRecipe(scale=(0.25, 0.25), ratio=(1.0, 1.0))), 4000)
    for position in (found[:, 0], found[:, 1]):
        assert position.min() < 5
        assert position.max() > 495
        assert abs(position.mean() - 250) < 4 * 500 / math.sqrt(12 * 4000)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_flip_rate(probability: float) -> None:
    rate = boxes(ViewRecipe(seed=3, count=1, hflip=probability), 4000)[:, 4].mean()
    assert abs(rate - probability) <= 4 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize(("key", "drawn"), [(263496, 0), (1329367, ONE - 1)])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_flip_hold_for_the_extreme_draws(key: int, drawn: int, probability: float) -> None:
    assert draw_below(np.uint64(stream(np.uint64(0), np.uint64(key), 0)), 64, ONE) == drawn
    parameters = view_parameters(ViewRecipe(seed=0, count=1, hflip=probability))
    assert box_of(key, 0, 300, 400, parameters)[4] == (probability == 1.0)


@pytest.mark.parametrize(("ratio", "axis"), [(2.0, 3), (0.5, 2)])
def test_a_crop_may_be_as_wide_or_as_high_as_the_image(ratio: float, axis: int) -> None:
    found = boxes(ViewRecipe(seed=4, count=1, crop=CropRecipe(scale=(0.5, 0.5), ratio=(ratio, ratio))), 50)
    assert (found[:, axis] == 1000).all()
    assert (found[:, 5 - axis] == 500).all()
    assert len(set(found[:, 3 - axis])) > 30, "places differ: it is not the fallback"


def test_both_ends_of_the_scale_are_drawn() -> None:
    """Of two neighboring areas, about 24 and 48 pixels of 5000 x 5000."""
    recipe = ViewRecipe(seed=5, count=1, crop=CropRecipe(scale=(1 / ONE, 2 / ONE), ratio=(1.0, 1.0)))
    assert set(boxes(recipe, 50, 5000, 5000)[:, 2]) == {5, 7}


def test_aspects_are_centered_in_their_range() -> None:
    """4096 of them, the middles of equal steps in log space: a range around 1 gives a ratio and its inverse."""
    roots = view_parameters(ViewRecipe(seed=0, count=1, crop=CropRecipe(ratio=(0.5, 2.0)))).sqrt_aspect / ONE
    assert roots * roots[::-1] == pytest.approx(1, abs=4 / ONE)
    assert np.diff(2 * np.log(roots)) == pytest.approx(math.log(4) / 4096, abs=4 / ONE)


@pytest.mark.parametrize(("height", "width"), [(20, 2000), (2000, 20), (100, 1000)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    """Where no try can fit, ten tries end in the center crop nearest to the allowed aspects."""
    crop = CropRecipe(scale=(0.9, 1.0), ratio=(0.75, 1.3333))
    found = box_of(0, 0, height, width, view_parameters(ViewRecipe(seed=0, count=1, crop=crop)))[:4]
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [0.75, 1.3333])
    assert np.abs(np.array(found) - expected).max() <= 1


@pytest.mark.parametrize("center", [1.0, 0.5])
def test_without_a_crop_the_view_is_the_center_square(center: float) -> None:
    """Whatever the center view is: a view is a function of the recipe alone."""
    parameters = view_parameters(ViewRecipe(seed=0, count=1, crop=None, hflip=0.0), center)
    assert box_of(5, 0, 300, 500, parameters) == (0, 100, 300, 300, False)


@pytest.mark.parametrize("center", [0.001, 0.5, 0.875, 1.0])
def test_the_center_square_is_rounded_and_in_the_middle(center: float) -> None:
    parameters = view_parameters(RECIPE, center)
    for shorter in range(1, 60):
        side = max(1, math.floor(shorter * parameters.center / ONE + 0.5))
        middle, beside = (shorter - side) // 2, (100 - side) // 2
        assert box_of(0, CENTER, shorter, 100, parameters) == (middle, beside, side, side, False)
        assert box_of(0, CENTER, 100, shorter, parameters) == (beside, middle, side, side, False)


def test_the_center_view_draws_nothing() -> None:
    parameters = view_parameters(RECIPE, 0.5)
    assert {box_of(key, CENTER, 300, 500, parameters) for key in range(20)} == {(75, 175, 150, 150, False)}


@pytest.mark.parametrize("size", [32, 160, 224, 288])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_the_center_crop_is_timms(size: int, crop_pct: float) -> None:
    """timm resizes the shorter side, then crops; a ramp shows which part of the image is left."""
    side = 2000
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, side), (side, 1)).astype(np.uint8)).convert("RGB")
    transform = timm.data.create_transform((3, size, size), is_training=False, crop_pct=crop_pct, normalize=False)
    left, right = (int(transform(ramp)[0, size // 2, column]) for column in (0, -1))  # pyright: ignore
    box = box_of(0, CENTER, side, side, view_parameters(None, center_fraction(size, crop_pct)))
    half = box[3] / size / 2  # half a pixel of the output, in pixels of the image
    tolerance = 1.5 + 255 * half / side  # torchvision's CenterCrop begins at a whole pixel of the resized image
    assert left == pytest.approx(255 * (box[1] + half) / side, abs=tolerance)
    assert right == pytest.approx(255 * (box[1] + box[3] - half) / side, abs=tolerance)
