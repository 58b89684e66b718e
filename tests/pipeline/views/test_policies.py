"""Augmentation policies against timm and torchvision: their tables, their draws, and the pixels that come out."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.draw_checks import assert_frequencies, key_of_draw, parameters_of, uncompiled
from numba import njit
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_policies
from torchvision.transforms import ColorJitter, TrivialAugmentWide, functional

from softshard.pipeline.recipes.recipe import (
    AutoAugmentRecipe,
    ColorJitterRecipe,
    RandAugmentRecipe,
    ThreeAugmentRecipe,
    TrivialAugmentRecipe,
)
from softshard.pipeline.views import policies
from softshard.pipeline.views.kernels.rng import ONE, stream
from softshard.pipeline.views.parameters import MEAN_COLOR, ViewParameters
from softshard.pipeline.views.policies import (
    BLUR,
    BLUR_UNIT,
    BRIGHTNESS,
    CONTRAST,
    DEGREE,
    FACTOR,
    GRAY,
    HUE,
    IDENTITY,
    OPERATION_NAMES,
    PLAN_LENGTH,
    POLICY_WORD,
    POSTERIZE,
    RADIUS_BITS,
    RAND_OPERATIONS,
    ROTATE,
    SATURATION,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE,
    TRANSLATE_X,
    TRANSLATE_Y,
    TRIVIAL_OPERATIONS,
    level_argument,
    plan_operations,
)
from softshard.pipeline.views.render import operate

FACTORS = (SATURATION, CONTRAST, BRIGHTNESS, SHARPNESS)
MOVES = (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y)
UNITS = dict.fromkeys(MOVES, ONE) | dict.fromkeys(FACTORS, FACTOR) | {ROTATE: DEGREE}  # of those not whole-numbered
# timm's and torchvision's names of the operations, without the endings that say how a level becomes an argument
NAMES = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
JITTER = ColorJitterRecipe(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
RECIPES = {
    "rand": {"rand_augment": RandAugmentRecipe()},
    "rand, decreasing": {"rand_augment": RandAugmentRecipe(magnitude=5.0, std=2.0, increasing=False, operations=4)},
    "auto": {"auto_augment": AutoAugmentRecipe()},
    "trivial": {"trivial_augment": TrivialAugmentRecipe()},
    "three": {"three_augment": ThreeAugmentRecipe()},
    "jitter": {"color_jitter": JITTER},
    "rand and jitter": {"rand_augment": RandAugmentRecipe(operations=8, probability=1.0), "color_jitter": JITTER},
}


@njit
def fill_plans(p, plans, counts):
    for key in range(len(plans)):
        counts[key] = plan_operations(p, stream(p.seed, key, 0), plans[key])


def plans_of(p: ViewParameters, count: int) -> list[list[tuple[int, int]]]:
    """The plans of view 0 of the keys 0, 1, 2 ...; what a plan does not use stays as it was."""
    plans, counts = np.full((count, PLAN_LENGTH, 2), -99, np.int64), np.empty(count, np.int64)
    fill_plans(p, plans, counts)
    assert counts.min() >= 0
    assert counts.max() <= PLAN_LENGTH
    assert (plans[np.arange(PLAN_LENGTH) >= counts[:, None]] == -99).all()
    return [[(int(op), int(arg)) for op, arg in plan[:length]] for plan, length in zip(plans, counts, strict=True)]


def operations_of(plans: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [step for plan in plans for step in plan]


def natural(operation: int, argument: int) -> float:
    return argument / UNITS[operation] if operation in UNITS else argument


def operation_of(name: str) -> int:
    for ending in ("Increasing", "Original", "Rel"):
        name = name.removesuffix(ending)
    return NAMES.index(name)


def assert_same_frequencies(first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    """Chi squared of a table of two rows."""
    table = np.stack([first, second])
    table = table[:, table.sum(axis=0) > 0]
    assert (table.sum(axis=1) > 0).all()
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table)[1] > 1e-4  # pyright: ignore  (a named tuple)


def assert_same_distribution(first: list[float], second: list[float]) -> None:
    assert min(len(first), len(second)) > 50
    result = stats.ks_2samp(np.round(first, 4), np.round(second, 4), method="asymp")
    assert result.pvalue > 1e-4  # pyright: ignore  (a named tuple)


def assert_like(ours: list[list[tuple[int, int]]], theirs: list[list[tuple[int, float]]]) -> None:
    """How many operations, which, and with what arguments: each distributed in the same way."""
    lengths = [np.bincount([len(plan) for plan in plans], minlength=PLAN_LENGTH) for plans in (ours, theirs)]
    assert_same_frequencies(lengths[0], lengths[1])
    steps = [[(op, natural(op, arg)) for op, arg in operations_of(ours)], [step for plan in theirs for step in plan]]
    which = [np.bincount([op for op, _ in some], minlength=len(OPERATION_NAMES)) for some in steps]
    assert_same_frequencies(which[0], which[1])
    for operation in {op for op, _ in steps[1]}:
        first, second = ([argument for op, argument in some if op == operation] for some in steps)
        assert_same_distribution(first, second)


# RandAugment


@pytest.mark.parametrize("increasing", [True, False])
def test_rand_augments_operations_are_timms(increasing: bool) -> None:
    names = timm_policies.rand_augment_choices("", increasing)
    assert [operation_of(name) for name in names] == list(range(RAND_OPERATIONS))
    assert len(OPERATION_NAMES) == IDENTITY + 1
    kept = {"color": "saturation"}
    for name, ours in zip(NAMES, OPERATION_NAMES, strict=False):
        assert kept.get(name.lower(), name.lower()) == ours.replace(" ", "")


def timm_argument(name: str, level: float, positive: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(timm_policies.random, "random", lambda: 0.0 if positive else 1.0)
    function = timm_policies.LEVEL_TO_ARG[name]
    return function(level, {})[0] if function else 0


SCALES = {
    policies.DECREASING: timm_policies._RAND_TRANSFORMS,
    policies.INCREASING: timm_policies._RAND_INCREASING_TRANSFORMS,
    policies.ORIGINAL: [name + "Original" * (name == "Posterize") for name in timm_policies._RAND_TRANSFORMS],
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("positive", [True, False])
def test_levels_become_timms_arguments(scale: int, positive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole-numbered ones exactly, the others to half a unit of their kernel."""
    levels = [*range(0, 10 * ONE + 1, ONE // 64), *range(0, 10 * ONE, 99991), 10 * ONE - 1]
    for name in SCALES[scale]:
        operation = operation_of(name)
        for level in levels:
            found = int(level_argument(np.int64(operation), np.int64(level), np.int64(positive * 2 - 1), scale))
            expected = timm_argument(name, level / ONE, positive, monkeypatch)
            if operation in UNITS:
                assert abs(found - expected * UNITS[operation]) <= 0.5 + 1e-6, (name, level)
            else:
                assert found == expected, (name, level)


class Recorder:
    """Stands for timm's pixel functions: remembers what is called."""

    def __init__(self) -> None:
        self.plans: list[list[tuple[int, float]]] = []

    def spy(self, ops) -> None:
        for op in ops:
            name = op.name
            op.aug_fn = lambda image, *arguments, _name=name, **_: self.record(image, _name, *arguments)

    def record(self, image, name: str, argument: float = 0.0, *_) -> object:
        self.plans[-1].append((operation_of(name), argument))
        return image


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugmentRecipe()),
        (
            "rand-m5-n4-p0.7-mstd3-inc0",
            RandAugmentRecipe(magnitude=5.0, std=3.0, operations=4, probability=0.7, increasing=False),
        ),
        ("rand-m10-n1-p1-mstd0-inc1", RandAugmentRecipe(magnitude=10.0, std=0.0, operations=1, probability=1.0)),
    ],
)
def test_rand_augment_draws_as_timm_does(config: str, recipe: RandAugmentRecipe) -> None:
    np.random.seed(0)
    random.seed(0)
    transform, recorder = timm_policies.rand_augment_transform(config), Recorder()
    recorder.spy(transform.ops)
    for _ in range(8000):
        recorder.plans.append([])
        transform(Image.new("RGB", (1, 1)))
    assert_like(plans_of(parameters_of(1, rand_augment=recipe), 8000), recorder.plans)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("operations", [1, 2, 8])
def test_rand_augment_applies_each_operation_with_its_probability(operations: int, probability: float) -> None:
    recipe = RandAugmentRecipe(operations=operations, probability=probability)
    lengths = [len(plan) for plan in plans_of(parameters_of(2, rand_augment=recipe), 10_000)]
    expected = stats.binom.pmf(np.arange(operations + 1), operations, probability)
    assert_frequencies(np.bincount(lengths, minlength=operations + 1), expected)


@pytest.mark.parametrize("wanted", [0, ONE - 1])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_hold_for_the_extreme_draws(probability: float, wanted: int) -> None:
    p = parameters_of(0, rand_augment=RandAugmentRecipe(operations=1, probability=probability))
    plan, state = np.zeros((PLAN_LENGTH, 2), np.int64), stream(p.seed, key_of_draw(POLICY_WORD + 1, wanted), 0)
    assert plan_operations(p, np.uint64(state), plan) == probability


def levels_of(magnitude: float, std: float, count: int) -> NDArray[np.float64]:
    """Levels that were drawn, read from the angles."""
    recipe = RandAugmentRecipe(magnitude=magnitude, std=std, operations=8, probability=1.0)
    steps = operations_of(plans_of(parameters_of(3, rand_augment=recipe), count))
    return np.array([abs(argument) / DEGREE / 3 for operation, argument in steps if operation == ROTATE])


@pytest.mark.parametrize(("magnitude", "std"), [(5.0, 1.0), (9.0, 0.5), (9.0, 2.0), (0.5, 3.0), (5.0, 10.0)])
def test_magnitudes_are_normal_and_clipped(magnitude: float, std: float) -> None:
    levels = levels_of(magnitude, std, 8000)
    assert levels.min() >= 0
    assert levels.max() <= 10
    normal = stats.norm(magnitude, std)
    low, high = normal.cdf(0), normal.cdf(10)
    counts = [(levels == 0).sum(), (levels == 10).sum(), ((levels > 0) & (levels < 10)).sum()]
    assert_frequencies(counts, np.maximum([low, 1 - high, high - low], 1e-9))
    inside = levels[(levels > 0) & (levels < 10)]
    assert stats.kstest(inside, lambda level: (normal.cdf(level) - low) / (high - low)).pvalue > 1e-4


def test_without_deviation_every_magnitude_is_the_same() -> None:
    assert set(levels_of(7.0, 0.0, 500)) == {7.0}


def test_the_operations_of_rand_augment_are_independent() -> None:
    """Which, which sign, how strong: pairs of the first and the second operation of a view."""
    recipe = RandAugmentRecipe(operations=2, probability=1.0, std=2.0)
    plans = plans_of(parameters_of(4, rand_augment=recipe), 60_000)
    table, signs, levels = np.zeros((RAND_OPERATIONS, RAND_OPERATIONS)), np.zeros((2, 2)), []
    strongest = {operation: level_argument(operation, 10 * ONE, 1, policies.INCREASING) for operation in MOVES}
    for plan in plans:
        table[plan[0][0], plan[1][0]] += 1
        if all(operation in MOVES for operation, _ in plan):
            signs[int(plan[0][1] > 0), int(plan[1][1] > 0)] += 1
            levels.append([abs(argument) / strongest[operation] for operation, argument in plan])
    assert_frequencies(table, np.ones_like(table))
    assert_frequencies(signs, np.ones_like(signs))
    assert abs(np.corrcoef(np.array(levels).T)[0, 1]) < 4 / math.sqrt(len(levels))


# AutoAugment


def test_auto_augments_table_is_timms() -> None:
    theirs = timm_policies.auto_augment_policy_original({})
    table = [[(operation_of(op.name), round(10 * op.prob), op.magnitude) for op in pair] for pair in theirs]
    assert policies.AUTO_ORIGINAL.tolist() == [[list(step) for step in pair] for pair in table]
    assert {op.name for pair in theirs for op in pair if "Posterize" in op.name} == {"PosterizeOriginal"}


def test_auto_augment_draws_as_timm_does() -> None:
    np.random.seed(0)
    random.seed(0)
    recorder, table = Recorder(), timm_policies.auto_augment_policy_original({})
    transform = timm_policies.AutoAugment(table)
    for pair in table:
        recorder.spy(pair)
    for _ in range(20_000):
        recorder.plans.append([])
        transform(Image.new("RGB", (1, 1)))
    assert_like(plans_of(parameters_of(5, auto_augment=AutoAugmentRecipe()), 20_000), recorder.plans)


def test_auto_augments_plans_have_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that is possible, with its probability by timm's table."""
    expected: dict[tuple, float] = {}
    for pair in timm_policies.auto_augment_policy_original({}):
        for applied, positive in itertools.product(itertools.product([False, True], repeat=2), [False, True]):
            plan, probability = [], 1 / 25 / 2
            for op, is_applied in zip(pair, applied, strict=True):
                probability *= op.prob if is_applied else 1 - op.prob
                if is_applied:
                    argument = timm_argument(op.name, op.magnitude, positive, monkeypatch)
                    operation = operation_of(op.name)
                    plan.append((operation, round(argument * UNITS.get(operation, 1))))
            expected[tuple(plan)] = expected.get(tuple(plan), 0.0) + probability
    assert sum(expected.values()) == pytest.approx(1)
    found = dict.fromkeys(expected, 0)
    for plan in plans_of(parameters_of(6, auto_augment=AutoAugmentRecipe()), 50_000):
        found[tuple(plan)] += 1
    assert_frequencies(list(found.values()), list(expected.values()))


# TrivialAugment


def trivial_values(name: str, bins: int) -> list[float]:
    """torchvision's magnitudes of an operation, one for each equally likely draw, as our kernels take them."""
    magnitudes, signed = TrivialAugmentWide()._augmentation_space(bins)[name]
    values = magnitudes.double().reshape(-1).tolist() * (1 if magnitudes.ndim else bins)
    values = [sign * value for value in values for sign in ((1, -1) if signed else (1,))]
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return [(1 + value) * FACTOR for value in values]
    if name.startswith("Translate"):
        return [value * ONE / TRANSLATE for value in values]
    if name == "Solarize":
        return [sum(shade < value for shade in range(256)) for value in values]
    return [value * UNITS.get(operation_of(name), 1) for value in values]


@pytest.mark.parametrize("bins", [2, 5, 13, 31, 100])
def test_trivial_augments_arguments_are_torchvisions(bins: int) -> None:
    """Every magnitude of every operation, to half a unit (and torch's float32), with its frequency."""
    plans = plans_of(parameters_of(7, trivial_augment=TrivialAugmentRecipe(bins=bins)), 60_000)
    assert {len(plan) for plan in plans} == {0, 1}
    names = [name for name in TrivialAugmentWide()._augmentation_space(bins) if name != "Identity"]
    operations = [operation_of(name) for name in names]
    assert TRIVIAL_OPERATIONS.tolist() == [IDENTITY, *operations]
    found = {operation: [] for operation in operations}
    for operation, argument in operations_of(plans):
        found[operation].append(argument)
    counts = [len(found[operation]) for operation in operations]
    assert_frequencies([*counts, 60_000 - sum(counts)], [1] * 14)
    for name, operation in zip(names, operations, strict=True):
        values, multiplicity = np.unique(np.round(trivial_values(name, bins), 1), return_counts=True)
        arguments = np.array(found[operation])
        nearest = np.abs(arguments[:, None] - values[None]).argmin(axis=1)
        assert np.abs(arguments - values[nearest]).max() <= (0.6 if operation in UNITS else 0), name
        assert_frequencies(np.bincount(nearest, minlength=len(values)), multiplicity)


def test_trivial_augment_posterizes_and_solarizes_as_torchvision_does() -> None:
    """Whole-numbered arguments of every bin, where rounding could go either way."""
    for bins in (*range(2, 100), 1024):
        plans = plans_of(TRIVIAL._replace(bins=np.int64(bins)), 40 * bins)
        for name in ("Posterize", "Solarize"):
            found = {argument for operation, argument in operations_of(plans) if operation == operation_of(name)}
            expected = set(trivial_values(name, bins))
            assert found <= expected
            assert len(found) >= 0.8 * len(expected)


# ThreeAugment


def test_three_augment_is_timms() -> None:
    random.seed(0)
    recorder, table = Recorder(), timm_policies.auto_augment_policy_3a({})
    assert [[op.name for op in single] for single in table] == [["Solarize"], ["Desaturate"], ["GaussianBlurRand"]]
    recorder.spy(table[0])
    recorder.plans.append([])
    table[0][0](None)
    plans = plans_of(parameters_of(8, three_augment=ThreeAugmentRecipe(jitter=0.0)), 30_000)
    assert {len(plan) for plan in plans} == {1}
    found = {operation: [] for operation in (GRAY, SOLARIZE, BLUR)}
    for operation, argument in operations_of(plans):
        found[operation].append(argument)
    assert_frequencies([len(arguments) for arguments in found.values()], [1, 1, 1])
    assert recorder.plans == [[(SOLARIZE, argument)] for argument in set(found[SOLARIZE])]
    radii = np.array(found[BLUR]) / (1 << RADIUS_BITS)
    assert radii.min() == pytest.approx(0.1, abs=0.002)
    assert radii.max() == pytest.approx(2, abs=0.002)
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4


def test_three_augment_jitters_afterwards() -> None:
    with_jitter = plans_of(parameters_of(9, three_augment=ThreeAugmentRecipe(jitter=0.3)), 500)
    alone = plans_of(parameters_of(9, three_augment=ThreeAugmentRecipe(jitter=0.0)), 500)
    strengths = ColorJitterRecipe(brightness=0.3, contrast=0.3, saturation=0.3)
    jitter = plans_of(parameters_of(9, color_jitter=strengths), 500)
    assert with_jitter == [first + second for first, second in zip(alone, jitter, strict=True)]


# Color jitter


def signed(byte: int) -> int:
    return byte - 256 if byte > 128 else byte


STRENGTHS = [(0.4, 0.4, 0.4, 0.0), (1.0, 0.2, 0.7, 0.5), (0.0, 0.0, 0.5, 0.1), (0.0, 1.0, 0.0, 0.0)]


@pytest.mark.parametrize("strengths", STRENGTHS)
def test_color_jitter_draws_as_torchvision_does(strengths: tuple[float, float, float, float]) -> None:
    """Orders and factors; hue as the byte by which torchvision turns it."""
    torch.manual_seed(0)
    transform, names = ColorJitter(*strengths), (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    ranges = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    theirs = []
    for _ in range(8000):
        order, *factors = ColorJitter.get_params(*ranges)  # pyright: ignore  (tuples, as its own forward gives)
        drawn = [(names[place], factors[place]) for place in order.tolist() if factors[place] is not None]
        theirs.append([(op, float(np.int32(value * 255)) if op == HUE else value) for op, value in drawn])
    recipe = ColorJitterRecipe(**dict(zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True)))
    ours = plans_of(parameters_of(10, color_jitter=recipe), 8000)
    ours = [[(op, signed(arg) if op == HUE else arg) for op, arg in plan] for plan in ours]
    assert_like(ours, theirs)
    counts = Counter(tuple(op for op, _ in plan) for plan in ours)
    assert set(counts) == {tuple(op for op, _ in plan) for plan in theirs}
    assert_frequencies(list(counts.values()), np.ones(len(counts)))


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0])
def test_factors_are_uniform_around_one(strength: float) -> None:
    recipe = ColorJitterRecipe(brightness=strength, contrast=strength, saturation=strength)
    steps = operations_of(plans_of(parameters_of(11, color_jitter=recipe), 10_000))
    for wanted in (BRIGHTNESS, CONTRAST, SATURATION):
        factors = np.array([argument / FACTOR for operation, argument in steps if operation == wanted])
        assert len(factors) == 10_000
        assert factors.min() >= 1 - strength - 1 / FACTOR
        assert factors.max() <= 1 + strength + 1 / FACTOR
        assert stats.kstest(factors, stats.uniform(1 - strength, 2 * strength).cdf).pvalue > 1e-4


def test_factors_and_orders_are_independent() -> None:
    strong = ColorJitterRecipe(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5)
    rows = []
    for plan in plans_of(parameters_of(13, color_jitter=strong), 8000):
        drawn = {op: signed(arg) if op == HUE else arg for op, arg in plan}
        places = {op: place for place, (op, _) in enumerate(plan)}
        rows.append([drawn[op] for op in sorted(drawn)] + [places[op] for op in (BRIGHTNESS, HUE)])
    correlations = np.corrcoef(np.array(rows, float).T)
    assert correlations[4, 5] == pytest.approx(-1 / 3, abs=4 / math.sqrt(8000)), "places exclude each other"
    correlations[4, 5] = correlations[5, 4] = 0
    assert np.abs(correlations - np.eye(6)).max() < 4.5 / math.sqrt(8000)


def test_hue_shifts_are_truncated_to_bytes() -> None:
    """Every shift up to half of the circle; none at all is twice as likely, as the byte is rounded towards 0."""
    recipe = ColorJitterRecipe(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5)
    steps = operations_of(plans_of(parameters_of(12, color_jitter=recipe), 60_000))
    shifts = [signed(argument) for _, argument in steps]
    assert len(shifts) == 60_000
    expected = [1.0 + (shift == 0) for shift in range(-127, 128)]
    expected[0] = expected[-1] = 0.5
    assert_frequencies([shifts.count(shift) for shift in range(-127, 128)], expected)


# All together


TRIVIAL = parameters_of(trivial_augment=TrivialAugmentRecipe())


@pytest.mark.parametrize("policy", [{}, RECIPES["rand"], RECIPES["auto"], RECIPES["trivial"]], ids=str)
def test_a_policy_and_jitter_draw_independently(policy: dict) -> None:
    """Fixed words: neither changes what the other draws."""
    both, alone, jitter = (
        plans_of(parameters_of(13, **parts), 300) for parts in (policy | RECIPES["jitter"], policy, RECIPES["jitter"])
    )
    assert both == [first + second for first, second in zip(alone, jitter, strict=True)]


def test_the_longest_plan_fits() -> None:
    plans = plans_of(parameters_of(14, **RECIPES["rand and jitter"]), 1000)
    assert {len(plan) for plan in plans} == {12}


def test_without_a_policy_nothing_is_planned() -> None:
    assert plans_of(parameters_of(15), 100) == [[]] * 100


@pytest.mark.parametrize("name", RECIPES)
def test_seed_and_key_change_the_plan(name: str) -> None:
    first, second = (plans_of(parameters_of(seed, **RECIPES[name]), 400) for seed in (16, 17))
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 130
    assert len({tuple(plan) for plan in first}) > 30


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_plans_equal_uncompiled_ones(name: str) -> None:
    p = parameters_of(2**64 - 1, **RECIPES[name])
    expected = plans_of(p, 150)
    states = [np.uint64(stream(p.seed, key, 0)) for key in range(150)]
    with uncompiled():
        for state, plan in zip(states, expected, strict=True):
            found = np.zeros((PLAN_LENGTH, 2), np.int64)
            count = policies.plan_operations(p, state, found)
            assert [tuple(row) for row in found[:count].tolist()] == plan


# (recipe, key, view) -> plan: a change of these changes every store made before
FROZEN = {
    ("rand", 0, 0): [("translate y", -455700)],
    ("rand", 2**64 - 1, 1): [("contrast", 31077), ("sharpness", 3721)],
    ("rand", 77, 299): [("brightness", 29350), ("shear y", 314573)],
    ("rand, decreasing", 0, 0): [("translate y", -360038)],
    ("rand, decreasing", 2**64 - 1, 1): [("contrast", 27763), ("sharpness", 11516), ("equalize", 0)],
    ("rand, decreasing", 77, 299): [("brightness", 13941), ("shear y", 305410)],
    ("auto", 0, 0): [("saturation", 25231), ("solarize", 179)],
    ("auto", 2**64 - 1, 1): [("saturation", 13435), ("contrast", 25231)],
    ("auto", 77, 299): [("rotate", 1536), ("saturation", 7537)],
    ("trivial", 0, 0): [("sharpness", 10977)],
    ("trivial", 2**64 - 1, 1): [("contrast", 32604)],
    ("trivial", 77, 299): [("contrast", 21791)],
    ("three", 0, 0): [("solarize", 128), ("brightness", 12509), ("contrast", 20117), ("saturation", 12714)],
    ("three", 2**64 - 1, 1): [("solarize", 128), ("brightness", 18478), ("contrast", 14660), ("saturation", 17145)],
    ("three", 77, 299): [("solarize", 128), ("brightness", 15669), ("saturation", 14406), ("contrast", 18403)],
    ("jitter", 0, 0): [("brightness", 11218), ("hue", 7), ("contrast", 20117), ("saturation", 13938)],
    ("jitter", 2**64 - 1, 1): [("brightness", 19176), ("hue", 251), ("contrast", 14660), ("saturation", 16892)],
    ("jitter", 77, 299): [("brightness", 15430), ("saturation", 15066), ("hue", 18), ("contrast", 18403)],
}


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_plans(case: tuple[str, int, int]) -> None:
    name, key, view = case
    p, plan = parameters_of(7, **RECIPES[name]), np.zeros((PLAN_LENGTH, 2), np.int64)
    count = plan_operations(p, np.uint64(stream(p.seed, np.uint64(key), view)), plan)
    assert [(OPERATION_NAMES[op], arg) for op, arg in plan[:count].tolist()] == FROZEN[case]


def pillow(image: Image.Image, operation: int, argument: int) -> Image.Image:
    """The operation by timm, torchvision or Pillow, bilinear, with ImageNet's mean color outside."""
    moved = {"resample": Image.Resampling.BILINEAR, "fillcolor": MEAN_COLOR}
    if operation == POSTERIZE and argument == 0:
        return Image.new("RGB", image.size)  # Pillow refuses to keep no bits
    if operation == GRAY:
        return image.convert("L").convert("RGB")
    if operation == BLUR:
        return timm_policies.gaussian_blur(image, (argument * image.width // BLUR_UNIT) / (1 << RADIUS_BITS))
    if operation == HUE:
        shift = signed(argument)
        return functional.adjust_hue(image, (shift + math.copysign(0.5, shift)) / 255)  # pyright: ignore
    name = NAMES[operation] + "Rel" * (operation in (TRANSLATE_X, TRANSLATE_Y))
    arguments = (natural(operation, argument),) if timm_policies.LEVEL_TO_ARG[name] else ()
    return timm_policies.NAME_TO_OP[name](image, *arguments, **moved)


@pytest.mark.parametrize("size", [224, 97])
@pytest.mark.parametrize("name", RECIPES)
def test_plans_give_the_pixels_of_timm_and_pillow(name: str, size: int, photographs: list[Image.Image]) -> None:
    """Operation by operation, each applied to what the one before gave. Image.rotate has coefficients of its own."""
    spare = np.empty((2, size, size, 3), np.uint8)
    for number, plan in enumerate(plans_of(parameters_of(18, **RECIPES[name]), 60)):
        image = np.array(photographs[number % 2].resize((size, size)))
        for operation, argument in plan:
            expected = np.array(pillow(Image.fromarray(image), operation, argument))
            operate(operation, argument, image, spare)
            if operation == ROTATE:
                assert np.abs(image.astype(int) - expected).max() <= 1
                assert (image != expected).mean() < 0.01
            else:
                np.testing.assert_array_equal(image, expected, OPERATION_NAMES[operation])
