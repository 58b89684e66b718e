"""The generator against known answers and statistics, the tables against mpmath and SciPy."""

import decimal
import hashlib
import itertools
import math

import numpy as np
import pytest
from helpers.draw_checks import uncompiled
from mpmath import mp
from numba import njit
from numpy.typing import NDArray
from scipy import stats

from softshard.pipeline.views.kernels import rng
from softshard.pipeline.views.kernels.rng import (
    ASPECTS,
    ONE,
    QUANTILES,
    beta_quantiles,
    draw,
    draw_below,
    fixed,
    normal_quantiles,
    sqrt_aspects,
    stream,
    stream_states,
)

ALPHAS = [0.01, 0.05, 0.1, 0.2, 0.4, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0, 10.0]
MIDDLES = (np.arange(QUANTILES) + 0.5) / QUANTILES
# BLAKE2b of the tables as little-endian int64: a change of these changes every store made before
FROZEN = {
    "normal": "688ed6e1a9914c7d",
    "beta 0.2": "6c4dd356bc6ca961",
    "beta 0.8": "69b279ae1467524b",
    "beta 1": "7f19160104aced80",
    "beta 4": "546c7e55c3ee4cfe",
    "aspects 0.75 1.3333": "4ef72a6527241a85",
    "aspects 0.3 3.3333": "f5cee105f22ae6bd",
}


def table(name: str) -> NDArray[np.int64]:
    kind, *numbers = name.split()
    makers = {"normal": normal_quantiles, "beta": beta_quantiles, "aspects": sqrt_aspects}
    return makers[kind](*map(float, numbers))


def test_the_generator_gives_splitmix64s_known_answers() -> None:
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(draw(np.uint64(1234567), number)) for number in range(5)] == expected


def test_streams_have_known_answers() -> None:
    """Of this project's own making: a change of these changes every store made before."""
    answers = {
        (0, 0, 0): 18152189527315630385,
        (7, 2**63, 1): 11645268165206782176,
        (2**64 - 1, 2**64 - 1, 10**6): 11854822218314224757,
        (1, 0, 0): 7922185879440905606,
        (0, 1, 0): 2471363168480975520,
        (0, 0, 1): 16635762117921189620,
    }
    for (seed, key, view), state in answers.items():
        assert stream(np.uint64(seed), np.uint64(key), view) == state


def test_streams_of_an_array_are_those_of_its_elements() -> None:
    keys = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert list(stream_states(np.uint64(5), keys, 3)) == [stream(np.uint64(5), key, 3) for key in keys]


def test_seed_key_and_view_play_different_parts() -> None:
    states = {int(stream(np.uint64(s), np.uint64(k), v)) for s, k, v in itertools.product(range(16), repeat=3)}
    assert len(states) == 16**3


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_bit_of_seed_key_and_view_changes_half_of_the_state(place: int) -> None:
    changes = []
    for bit, start in itertools.product(range(63 if place == 2 else 64), range(20)):
        numbers = [np.uint64(start), np.uint64(start * 0x123456789), np.int64(start)]
        state = int(stream(*numbers))
        numbers[place] ^= type(numbers[place])(1 << bit)  # pyright: ignore
        changes.append((state ^ int(stream(*numbers))).bit_count())
    assert min(changes) > 10
    assert np.mean(changes) == pytest.approx(32, abs=4 * 4 / math.sqrt(len(changes)))


@njit
def draws_of(seed, keys, views, numbers, bound):
    """draw_below for every combination, the numbers fastest."""
    found = np.empty(len(keys) * len(views) * len(numbers), np.int64)
    place = 0
    for key in keys:
        for view in views:
            state = stream(seed, key, view)
            for number in numbers:
                found[place] = draw_below(state, number, bound)
                place += 1
    return found


GRIDS = {
    "words": (np.arange(1), np.arange(1), np.arange(128, 128 + 64_000)),
    "views": (np.arange(1), np.arange(64_000), np.arange(130, 131)),
    "keys": (np.arange(64_000), np.arange(1), np.arange(130, 131)),
    "words, eight apart": (np.arange(1), np.arange(8000), np.arange(128, 192, 8)),
}


@pytest.mark.parametrize("bound", [2, 3, 10, 31])
@pytest.mark.parametrize("grid", GRIDS)
def test_integers_below_a_bound_are_uniform_and_neighbors_independent(grid: str, bound: int) -> None:
    """Chi squared of single draws, and of pairs of neighbors along words, views or keys; p = 0.0001."""
    keys, views, numbers = GRIDS[grid]
    found = draws_of(np.uint64(9), keys.astype(np.uint64), views, numbers, bound)
    assert found.min() == 0
    assert found.max() == bound - 1
    for values, cells in ((found, bound), (found[::2] * bound + found[1::2], bound**2)):
        counts = np.bincount(values, minlength=cells)
        expected = len(values) / cells
        assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(0.9999, cells - 1)


def test_integers_below_a_bound_come_from_the_upper_half_of_a_word() -> None:
    for number in range(200):
        upper = int(draw(np.uint64(3), number)) >> 32
        assert draw_below(np.uint64(3), number, 2**32) == upper
        assert draw_below(np.uint64(3), number, 1) == 0
        assert draw_below(np.uint64(3), number, 1000) == upper * 1000 >> 32


def test_fractions_are_rounded() -> None:
    assert [fixed(value) for value in (0.0, 1.0, 0.5, 1 / 3, 2 / 3, 0.4 / ONE, 0.6 / ONE)] == [
        0, ONE, ONE // 2, 349525, 699051, 0, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_tables(name: str) -> None:
    assert hashlib.blake2b(table(name).astype("<i8").tobytes(), digest_size=8).hexdigest() == FROZEN[name]


def assert_rounds_safely(exact: list, rounded: NDArray[np.int64]) -> None:
    """`rounded` is what the exact values round to, none within 1e-9 of the middle of two integers (or right on it,
    where doubles are exact): no C library rounds any of them differently."""
    for value, integer in zip(exact, rounded, strict=True):
        assert abs(value - int(integer)) < 0.5 - 1e-9


def test_normal_quantiles_round_safely() -> None:
    with mp.workdps(40):
        exact = [mp.sqrt(2) * mp.erfinv(mp.mpf(2 * k + 1) / QUANTILES - 1) * ONE for k in range(QUANTILES)]
        assert_rounds_safely(exact, normal_quantiles())


def test_normal_quantiles_are_those_of_the_standard_normal_distribution() -> None:
    found = normal_quantiles()
    assert len(found) == 1024
    assert (np.diff(found) > 0).all()
    assert (found + found[::-1] == 0).all()
    assert np.abs(found / ONE - stats.norm.ppf(MIDDLES)).max() < 1 / ONE
    assert (found / ONE).std() == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta_quantiles_are_scipys(alpha: float) -> None:
    found = beta_quantiles(alpha)
    assert len(found) == 1024
    assert (np.diff(found) >= 0).all()
    assert (found + found[::-1] == ONE).all()
    assert found.min() >= 0
    assert np.abs(found / ONE - stats.beta.ppf(MIDDLES, alpha, alpha)).max() < 0.51 / ONE


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beta_quantiles_round_safely(alpha: float) -> None:
    """One step of Newton's method from SciPy's doubles; the density there is what its slope is."""
    with mp.workdps(40):
        exact, scale = [], mp.beta(alpha, alpha)
        for k, start in enumerate(stats.beta.ppf(MIDDLES[: QUANTILES // 2], alpha, alpha)):
            x = mp.mpf(float(start))
            if x > 1e-12:
                density = (x * (1 - x)) ** (mp.mpf(alpha) - 1) / scale
                below = mp.betainc(alpha, alpha, 0, x, regularized=True)
                x -= (below - mp.mpf(2 * k + 1) / (2 * QUANTILES)) / density
            exact.append(x * ONE)
        assert_rounds_safely(exact, beta_quantiles(alpha)[: QUANTILES // 2])


@pytest.mark.parametrize("bounds", [(0.75, 1.3333), (0.3, 3.3333), (0.01, 100.0), (1.0, 1.0), (0.5, 0.5001)])
def test_aspects_are_the_middles_of_equal_steps_in_log_space(bounds: tuple[float, float]) -> None:
    found = sqrt_aspects(*bounds)
    assert len(found) == ASPECTS == 4096
    assert (np.diff(found) >= 0).all()
    with mp.workdps(40):
        low, high = (mp.log(mp.mpf(bound)) for bound in bounds)
        for k in range(0, ASPECTS, 17):
            log = low + (high - low) * (2 * k + 1) / (2 * ASPECTS)
            assert int(mp.nint(mp.exp(log / 2) * ONE)) == found[k]


def test_aspects_do_not_depend_on_the_process_s_decimal_context() -> None:
    with decimal.localcontext(decimal.Context(prec=4, rounding=decimal.ROUND_UP)):
        found = sqrt_aspects(0.75, 1.3333)
    np.testing.assert_array_equal(found, sqrt_aspects(0.75, 1.3333))


def test_compiled_generators_equal_uncompiled_ones() -> None:
    cases = list(itertools.product([0, 5, 2**63, 2**64 - 1], [0, 1, 2**64 - 1], [-1, 0, 7, 10**6]))
    states = [np.uint64(stream(np.uint64(seed), np.uint64(key), np.int64(view))) for seed, key, view in cases]
    below = [draw_below(state, number, 12345) for state in states for number in (0, 64, 2048)]
    with uncompiled():
        for (seed, key, view), state in zip(cases, states, strict=True):
            assert rng.stream(np.uint64(seed), np.uint64(key), np.int64(view)) == state
        assert below == [rng.draw_below(state, number, 12345) for state in states for number in (0, 64, 2048)]
