"""Erasing and mixing against timm: rates, boxes, lams and partners."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers.draw_checks import assert_frequencies, key_of_draw, parameters_of, uncompiled
from numba import njit
from numpy.typing import NDArray
from scipy import stats
from timm.data import mixup as timm_mixup
from timm.data.random_erasing import RandomErasing

from softshard.pipeline.recipes.recipe import (
    ColorJitterRecipe,
    MixRecipe,
    RandAugmentRecipe,
    RandomErasingRecipe,
)
from softshard.pipeline.views import geometry, mixing, policies
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.kernels import rng
from softshard.pipeline.views.kernels.rng import ONE, draw, draw_below, stream
from softshard.pipeline.views.mixing import (
    CUTMIX,
    ERASE_WORD,
    MIX_WORD,
    MIXUP,
    UNMIXED,
    cut_box,
    erase_box,
    erase_noise_state,
    erasures,
    mix_kind,
    mix_lam,
    partner,
)
from softshard.pipeline.views.parameters import ViewParameters

NARROW = {"area": (0.02, 0.3333), "aspect": (0.3, 3.3333)}
WIDE = {"area": (0.3, 1.0), "aspect": (0.1, 10.0)}


def erasing(seed: int = 0, probability: float = 1.0, **options) -> ViewParameters:
    return parameters_of(seed, random_erasing=RandomErasingRecipe(probability=probability, **options))


def states_of(p: ViewParameters, count: int, view: int = 0) -> NDArray[np.uint64]:
    return rng.stream_states(p.seed, np.arange(count, dtype=np.uint64), view)


@njit
def fill_boxes(p, states, size, boxes):
    for i in range(len(boxes)):
        for number in range(boxes.shape[1]):
            boxes[i, number] = erase_box(p, states[i], number, size)


def boxes_of(p: ViewParameters, size: int, count: int) -> NDArray[np.int64]:
    """int64 [count, boxes of a view, 4]."""
    boxes = np.empty((count, int(p.erase_count), 4), np.int64)
    fill_boxes(p, states_of(p, count), size, boxes)
    return boxes


@njit
def fill_mixing(p, states, size, kinds, lams, cuts):
    for i in range(len(states)):
        kinds[i] = mix_kind(p, states[i])
        lams[i] = mix_lam(p, states[i], kinds[i])
        cuts[i] = cut_box(states[i], lams[i], size)


def mixing_of(
    p: ViewParameters, count: int, size: int = 224
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Kinds, lams and cut boxes of the first keys."""
    kinds, lams, cuts = np.empty(count, np.int64), np.empty(count, np.int64), np.empty((count, 4), np.int64)
    fill_mixing(p, states_of(p, count), size, kinds, lams, cuts)
    return kinds, lams, cuts


def assert_same_distribution(first: NDArray, second: NDArray) -> None:
    """Kolmogorov-Smirnov of two samples, p = 0.0001."""
    result = stats.ks_2samp(first, second, method="asymp")
    assert result.pvalue > 1e-4  # pyright: ignore  (a named tuple)


def assert_inside(boxes: NDArray[np.int64], size: int) -> None:
    assert boxes.min() >= 0
    assert (boxes[..., 0] + boxes[..., 2]).max() <= size
    assert (boxes[..., 1] + boxes[..., 3]).max() <= size


# Erasing


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_views_are_erased_at_their_rate(probability: float, count: int) -> None:
    p = erasing(1, probability=probability, count=count)
    numbers = [int(erasures(p, state)) for state in states_of(p, 8000)]
    assert set(numbers) <= {0, count}
    assert_frequencies([numbers.count(0), numbers.count(count)], [1 - probability, probability])


@pytest.mark.parametrize("wanted", [0, ONE - 1])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_hold_for_the_extreme_draws(probability: float, wanted: int) -> None:
    p = erasing(0, probability=probability)
    state = np.uint64(stream(np.uint64(0), np.uint64(key_of_draw(ERASE_WORD, wanted)), 0))
    assert erasures(p, state) == probability
    p = parameters_of(0, mixup=MixRecipe(probability=probability))
    state = np.uint64(stream(np.uint64(0), np.uint64(key_of_draw(MIX_WORD + 1, wanted)), 0))
    assert mix_kind(p, state) == (MIXUP if probability else UNMIXED)


def test_without_erasing_nothing_is_erased() -> None:
    p = parameters_of()
    assert not any(erasures(p, state) for state in states_of(p, 500))


class Slices:
    """Stands for an image: remembers which boxes timm writes to."""

    def __init__(self) -> None:
        self.boxes: list[tuple[int, int, int, int]] = []

    def __setitem__(self, key, value) -> None:
        _, rows, columns = key
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


def timm_boxes(size: int, views: int, count: int, area, aspect) -> NDArray[np.int64]:
    random.seed(0)
    eraser = RandomErasing(1.0, *area, *aspect, min_count=count, max_count=count, device="cpu")
    slices = Slices()
    for _ in range(views):
        eraser._erase(slices, 3, size, size, torch.float32)
    return np.array(slices.boxes)


@pytest.mark.parametrize(("size", "ranges"), [(32, NARROW), (97, NARROW), (224, NARROW), (224, WIDE), (1000, WIDE)])
@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_distributed_as_timms(size: int, count: int, ranges: dict) -> None:
    """How often ten tries fail, heights, widths, areas, shapes and places. In small views timm rounds before it decides
    whether a large box fits."""
    views = 6000
    ours = boxes_of(erasing(2, count=count, **ranges), size, views).reshape(-1, 4)
    theirs = timm_boxes(size, views, count, **ranges)
    erased = ours[ours[:, 2] > 0]
    total = views * count
    missing = (total - len(erased), total - len(theirs))
    assert abs(missing[0] - missing[1]) <= 5 * math.sqrt(max(missing) + 1)
    assert_inside(erased, size)
    for column in range(4):
        assert_same_distribution(erased[:, column], theirs[:, column])
    assert_same_distribution(erased[:, 2] * erased[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(erased[:, 2] / erased[:, 3], theirs[:, 2] / theirs[:, 3])
    room = [(boxes[:, :2] + 0.5) / (size - boxes[:, 2:] + 1) for boxes in (erased, theirs)]
    for axis in range(2):
        assert_same_distribution(room[0][:, axis], room[1][:, axis])


@pytest.mark.parametrize(
    "options", [{"count": 2}, {"count": 1, **WIDE}, {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}, {"area": (1e-6, 1e-6)}]
)
def test_boxes_lie_inside_the_view_at_every_size(options: dict) -> None:
    p = erasing(3, **options)
    for size in range(1, 401):
        assert_inside(boxes_of(p, size, 60), size)


@pytest.mark.parametrize("ranges", [{}, WIDE], ids=["timm's", "wide"])
def test_every_size_erases_the_same_part(ranges: dict) -> None:
    """To two pixels: even where a box hardly fits, the size does not decide whether it does."""
    p = erasing(4, count=2, **ranges)
    fractions = {size: boxes_of(p, size, 20_000) / size for size in (160, 224, 384)}
    for size in (224, 384):
        assert ((fractions[160][..., 2] > 0) == (fractions[size][..., 2] > 0)).all()
        assert np.abs(fractions[160] - fractions[size]).max() < 2.51 / 160


def test_boxes_may_be_nearly_as_high_or_wide_as_the_view() -> None:
    boxes = boxes_of(erasing(4, 1.0, **WIDE), 1000, 20_000)[:, 0, 2:]
    assert (boxes > 990).mean(axis=0) == pytest.approx((boxes > 980).mean(axis=0) / 2, rel=0.3)
    assert boxes.max(axis=0).tolist() == [1000, 1000]


def test_the_boxes_of_a_view_are_independent() -> None:
    boxes = boxes_of(erasing(5, count=3), 1000, 6000)
    for (first, second), column in itertools.product([(0, 1), (0, 2), (1, 2)], range(4)):
        correlation = np.corrcoef(boxes[:, first, column], boxes[:, second, column])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(6000)


def test_every_box_has_noise_of_its_own() -> None:
    """Streams that are those of no other box or view."""
    p = erasing(6, count=16)
    states = states_of(p, 300)
    found = {int(erase_noise_state(state, number)) for state in states for number in range(16)}
    assert len(found) == 300 * 16
    assert found.isdisjoint(map(int, states))


@pytest.mark.parametrize("erasing_recipe", [None, RandomErasingRecipe()])
def test_noise_is_normal_around_the_mean_color(erasing_recipe: RandomErasingRecipe | None) -> None:
    """What normalized pixels of mean 0 and deviation 1 are before they are normalized, clipped to pixels."""
    noise = parameters_of(random_erasing=erasing_recipe).noise
    assert noise.shape == (3, 1024)
    assert noise.dtype == np.uint8
    for channel, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert (np.diff(noise[channel].astype(int)) >= 0).all()
        normal = stats.norm(mean * 255, deviation * 255)
        expected = normal.ppf((np.arange(1024) + 0.5) / 1024).clip(0, 255)
        assert np.abs(noise[channel] - expected).max() < 2


# Mixing


RATES = [(0.3, None), (None, 0.8), (1.0, None), (0.0, None), (0.7, 0.4), (1.0, 1.0), (0.0, 1.0), (0.8, 0.0)]


@pytest.mark.parametrize(("mixup", "cutmix"), RATES)
def test_each_kind_has_its_rate(mixup: float | None, cutmix: float | None) -> None:
    """Of two that are on, a coin decides which one may act."""
    parts = {"mixup": mixup, "cutmix": cutmix}
    p = parameters_of(7, **{name: MixRecipe(probability=rate) for name, rate in parts.items() if rate is not None})
    kinds = mixing_of(p, 10_000)[0]
    chosen = 0.5 if mixup is not None and cutmix is not None else 1.0
    rates = [chosen * (mixup or 0.0), chosen * (cutmix or 0.0)]
    counts = np.bincount(kinds, minlength=3)
    assert_frequencies(counts[[UNMIXED, MIXUP, CUTMIX]], [1 - sum(rates), *rates])


def test_without_recipes_nothing_is_mixed() -> None:
    p = parameters_of(random_erasing=RandomErasingRecipe())
    assert set(mixing_of(p, 500)[0]) == {UNMIXED}
    assert {int(partner(p, np.uint64(key), 0, 100)) for key in range(500)} == {-1}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_shares_follow_their_beta_distribution(kind: str, alpha: float) -> None:
    kinds, lams, _ = mixing_of(parameters_of(8, **{kind: MixRecipe(alpha=alpha)}), 10_000)
    assert set(kinds) == {MIXUP if kind == "mixup" else CUTMIX}
    assert lams.min() >= 0
    assert lams.max() <= ONE
    assert_same_distribution(lams, rounded_beta(alpha))


def rounded_beta(alpha: float) -> NDArray[np.float64]:
    """numpy's, in the unit of lams: a thirtieth of Beta(0.2, 0.2) is nearer to 0 than to the next one."""
    return np.round(np.random.default_rng(0).beta(alpha, alpha, 40_000) * ONE)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 97, 224])
def test_cut_boxes_are_timms(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same center and lam; odd boxes reach one pixel further down and right."""
    p = parameters_of(10, cutmix=MixRecipe())
    _, lams, cuts = mixing_of(p, 2000, size)
    centers: list[int] = []
    monkeypatch.setattr(timm_mixup.np.random, "randint", lambda low, high, size=None: centers.pop(0))
    odd = 0
    for state, lam, (top, left, height, width) in zip(states_of(p, 2000), lams, cuts, strict=True):
        centers += [int(draw_below(state, MIX_WORD + 4, size)), int(draw_below(state, MIX_WORD + 5, size))]
        low, high, start, end = timm_mixup.rand_bbox((3, size, size), lam / ONE)
        assert (top, top + height, left, left + width) == (low, high, start, end)
        odd += height % 2
    assert odd > 100 or size < 3


def test_cut_boxes_are_distributed_as_timms() -> None:
    np.random.seed(0)
    cuts = mixing_of(parameters_of(11, cutmix=MixRecipe(alpha=1.0)), 6000)[2]
    low, high, start, end = np.array(
        [timm_mixup.rand_bbox((3, 224, 224), lam) for lam in np.random.beta(1.0, 1.0, 6000)]
    ).T
    for ours, theirs in zip(cuts.T, (low, start, high - low, end - start), strict=True):
        assert_same_distribution(ours, theirs)
    assert_same_distribution(cuts[:, 2] * cuts[:, 3], (high - low) * (end - start))


@pytest.mark.parametrize("lam", [0, 1, ONE // 3, ONE - 1, ONE])
def test_cut_boxes_lie_inside_the_view_at_every_size(lam: int) -> None:
    for size, state in itertools.product(range(1, 401), states_of(parameters_of(12), 20)):
        top, left, height, width = cut_box(state, np.int64(lam), size)
        assert min(top, left, height, width) >= 0
        assert max(top + height, left + width) <= size
        assert lam < ONE or height == width == 0
        assert lam > 0 or max(top, size - top - height) <= size // 2


def test_every_size_cuts_the_same_part() -> None:
    p = parameters_of(13, cutmix=MixRecipe())
    fractions = [mixing_of(p, 5000, size)[2] / size for size in (160, 224, 384)]
    for other in fractions[1:]:
        assert np.abs(fractions[0] - other).max() < 2.51 / 160


def test_shares_and_places_are_independent() -> None:
    kinds, lams, _ = mixing_of(parameters_of(14, mixup=MixRecipe(), cutmix=MixRecipe()), 8000)
    states = states_of(parameters_of(14), 8000)
    down, across = ([int(draw_below(state, MIX_WORD + k, 1000)) for state in states] for k in (4, 5))
    p = parameters_of(14, mixup=MixRecipe(), cutmix=MixRecipe())
    partners = [int(partner(p, np.uint64(key), 0, 1000)) for key in range(8000)]
    correlations = np.corrcoef(np.array([kinds, lams, down, across, partners], float))
    assert np.abs(correlations - np.eye(5)).max() < 4.5 / math.sqrt(8000)


@pytest.mark.parametrize("count", [1, 2, 10, 97])
def test_partners_are_uniform_over_the_set(count: int) -> None:
    p = parameters_of(15, mixup=MixRecipe())
    found = [int(partner(p, np.uint64(key), view, count)) for key in range(500) for view in range(20)]
    assert_frequencies(np.bincount(found, minlength=count), np.ones(count))
    assert min(found) == 0
    assert max(found) == count - 1


def test_partners_of_the_largest_sets_are_inside() -> None:
    p = parameters_of(16, cutmix=MixRecipe())
    found = np.array([int(partner(p, np.uint64(key), 3, 2**32 - 1)) for key in range(4000)])
    assert found.min() >= 0
    assert found.max() < 2**32 - 1
    assert stats.kstest(found / 2**32, stats.uniform.cdf).pvalue > 1e-4


def test_a_view_has_a_partner_exactly_when_it_is_mixed() -> None:
    p = parameters_of(17, mixup=MixRecipe(probability=0.4), cutmix=MixRecipe(probability=0.6))
    kinds = mixing_of(p, 2000)[0]
    partners = np.array([int(partner(p, np.uint64(key), 0, 50)) for key in range(2000)])
    np.testing.assert_array_equal(partners == -1, kinds == UNMIXED)
    assert 0.4 < (kinds == UNMIXED).mean() < 0.6


def test_the_center_view_is_never_mixed() -> None:
    p = parameters_of(18, mixup=MixRecipe(), cutmix=MixRecipe())
    assert {int(partner(p, np.uint64(key), CENTER, 50)) for key in range(500)} == {-1}


# All together


FULL = {
    "rand_augment": RandAugmentRecipe(operations=8, probability=1.0),
    "color_jitter": ColorJitterRecipe(hue=0.1),
    "random_erasing": RandomErasingRecipe(probability=1.0, area=(1.0, 1.0), aspect=(0.5, 2.0), count=16),
    "mixup": MixRecipe(),
    "cutmix": MixRecipe(),
}


def test_no_two_decisions_read_the_same_word() -> None:
    """Of the largest recipe, in all modules: boxes that never fit read the most words."""
    p, words, state = parameters_of(19, **FULL), [], np.uint64(1)
    full = p._replace(erase_low=np.int64(100 * ONE), erase_high=np.int64(100 * ONE))

    def draw_middle(state, number, bound):
        words.append(int(number))
        return bound // 2

    with uncompiled() as patch:
        for module in (geometry, policies, mixing):
            patch.setattr(module, "draw_below", draw_middle)
        patch.setattr(mixing, "draw", lambda state, number: words.append(int(number)))
        geometry.view_geometry(full, np.uint64(0), 0, np.int64(10), np.int64(2000))
        policies.plan_operations(full, state, np.zeros((policies.PLAN_LENGTH, 2), np.int64))
        for number in range(mixing.erasures(full, state)):
            mixing.erase_box(full, state, number, 100)
            mixing.erase_noise_state(state, number)
        mixing.mix_lam(full, state, mixing.mix_kind(full, state))
        mixing.cut_box(state, ONE // 2, 100)
    expected = 20 + 1 + 8 * 4 + 3 + 4 + 1 + 16 * (2 * 10 + 1) + 2 + 1 + 2
    assert len(words) == len(set(words)) == expected
    assert MIX_WORD + 3 not in words, "the partner's"


def test_compiled_boxes_and_shares_equal_uncompiled_ones() -> None:
    cases = [(erasing(2**64 - 1, count=3), 224), (erasing(0, 1.0, **WIDE), 33), (erasing(1), 1)]
    compiled = [boxes_of(p, size, 100) for p, size in cases]
    states = [states_of(p, 100) for p, _ in cases]
    both = parameters_of(20, mixup=MixRecipe(alpha=0.3), cutmix=MixRecipe(probability=0.5))
    mixed, partners = mixing_of(both, 200, 97), [int(partner(both, np.uint64(key), 5, 1000)) for key in range(200)]
    mix_states = states_of(both, 200)
    with uncompiled():
        for (p, size), some, expected in zip(cases, states, compiled, strict=True):
            for state, boxes in zip(some, expected, strict=True):
                found = [mixing.erase_box(p, state, number, np.int64(size)) for number in range(len(boxes))]
                assert np.array(found).tolist() == boxes.tolist()
        for state, kind, lam, cut in zip(mix_states, *mixed, strict=True):
            assert mixing.mix_kind(both, state) == kind
            assert mixing.mix_lam(both, state, kind) == lam
            assert tuple(mixing.cut_box(state, lam, np.int64(97))) == tuple(cut)
        assert [mixing.partner(both, np.uint64(key), np.int64(5), 1000) for key in range(200)] == partners


# (key, view) -> boxes erased at 224, kind, lam, cut box at 224, partner among 1000, first word of the noise: a change
# of these changes every store made before
FROZEN = {
    (0, 0): ([(83, 38, 83, 64), (156, 97, 63, 109)], 2, 185856, (109, 97, 115, 127), 524, 12558459483894452593),
    (1, 0): ([(10, 160, 37, 33), (35, 46, 122, 47)], 0, 586637, (0, 136, 123, 88), -1, 6194357642943536838),
    (2**64 - 1, 1): ([(103, 80, 51, 46), (132, 74, 63, 106)], 2, 710144, (114, 5, 110, 127), 20, 11921000072250455884),
    (77, 299): ([(159, 46, 34, 30), (153, 86, 69, 21)], 1, 178381, (87, 0, 137, 139), 263, 9508139742027289390),
    (5, 2): ([(127, 10, 20, 55), (24, 139, 128, 63)], 1, 562, (0, 19, 182, 205), 517, 1298358556716019668),
    (6, 3): ([(93, 87, 88, 91), (143, 136, 26, 45)], 1, 1, (110, 0, 114, 115), 699, 5260963653389758994),
}


def frozen(key: int, view: int) -> tuple:
    p = parameters_of(
        7, random_erasing=RandomErasingRecipe(count=2), mixup=MixRecipe(alpha=0.2), cutmix=MixRecipe(probability=0.5)
    )
    state = np.uint64(stream(p.seed, np.uint64(key), view))
    boxes = [tuple(map(int, erase_box(p, state, number, 224))) for number in range(2)]
    kind = int(mix_kind(p, state))
    lam = mix_lam(p, state, kind)
    cut = tuple(map(int, cut_box(state, np.int64(lam), 224)))
    noise = int(draw(np.uint64(erase_noise_state(state, 1)), 0))
    return boxes, kind, int(lam), cut, int(partner(p, np.uint64(key), view, 1000)), noise


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_boxes_and_shares(case: tuple[int, int]) -> None:
    assert frozen(*case) == FROZEN[case]
