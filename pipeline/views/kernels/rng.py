"""Randomness: words of splitmix64 (Steele, Lea, Flood 2014), and the tables that turn them into numbers.

A stream belongs to (seed, key, view), and every decision reads words of fixed numbers: so a view does not depend on
worker, batch, rank, epoch or on what was drawn before. Tables hold rounded quantiles; whatever is drawn from them is
an integer.
"""

import statistics
from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.views.kernels.jit import compiled, kept

ONE = 1 << 20  # fixed-point fractions have 20 bits
ASPECTS = 4096  # aspect ratios are drawn from this many, evenly spaced in log space
QUANTILES = 1024  # of the normal and the beta distribution

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KEY_SALT = np.uint64(0xD1342543DE82EF95)


@compiled
def mix(word):
    """splitmix64's finalizer, uint64 -> uint64."""
    word = np.uint64(word)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled
def stream(seed, key, view):
    """The state of the stream that belongs to (seed, key, view)."""
    state = mix(np.uint64(seed) + _GOLDEN)
    state = mix(state ^ (np.uint64(key) + _GOLDEN))
    return mix(state ^ (np.uint64(view) * _KEY_SALT + _GOLDEN))


@compiled
def draw(state, number):
    """Word `number` of a stream: output `number` of splitmix64 seeded with `state`."""
    return mix(np.uint64(state) + (np.uint64(number) + np.uint64(1)) * _GOLDEN)


@compiled
def draw_below(state, number, bound):
    """An integer in [0, bound), bound <= 2**32, from the upper half of a word; the bias is below bound / 2**32."""
    return np.int64(((draw(state, number) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@kept
def stream_states(seed, keys, number):
    """stream(seed, key, number) for each key: uint64 [N] -> uint64 [N]."""
    states = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        states[i] = stream(seed, keys[i], number)
    return states


def fixed(fraction: float) -> np.int64:
    """A fraction in units of 1 / ONE, rounded."""
    return np.int64(round(fraction * ONE))


def sqrt_aspects(low: float, high: float) -> NDArray[np.int64]:
    """Square roots of ASPECTS aspect ratios, log-uniform in [low, high], in units of 1 / ONE.

    Decimal rounds exp and ln correctly, which the C library does not promise.
    """
    exact = Context(prec=40)
    start, end = exact.ln(Decimal(low)), exact.ln(Decimal(high))
    half_step = exact.divide(exact.subtract(end, start), Decimal(4 * ASPECTS))  # of the logarithms of the roots
    root = exact.exp(exact.add(exact.divide(start, Decimal(2)), half_step))
    ratio = exact.exp(exact.add(half_step, half_step))
    roots = []
    for _ in range(ASPECTS):
        roots.append(int(exact.to_integral_value(exact.multiply(root, ONE))))
        root = exact.multiply(root, ratio)
    return np.array(roots, np.int64)


def normal_quantiles() -> NDArray[np.int64]:
    """The middles of QUANTILES equally probable parts of the standard normal distribution, in units of 1 / ONE.

    No value is so near the middle of two integers that a C library could tip it over.
    """
    normal = statistics.NormalDist()
    return np.array([round(normal.inv_cdf((k + 0.5) / QUANTILES) * ONE) for k in range(QUANTILES)], np.int64)


def beta_quantiles(alpha: float) -> NDArray[np.int64]:
    """The same of Beta(alpha, alpha), in units of 1 / ONE.

    The distribution function's power series is inverted by bisection in the lower half; the upper half is its mirror
    image.
    """
    terms, factor = [], 1.0
    for n in range(80):  # below 1/2 each term is less than half of the one before
        terms.append(factor / (alpha + n))
        factor *= (n + 1 - alpha) / (n + 1)
    series = np.array(terms[::-1])

    def distribution(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x**alpha * np.polyval(series, x)

    wanted = (np.arange(QUANTILES // 2) + 0.5) / QUANTILES * 2 * distribution(np.array([0.5]))
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    lower = np.round(low * ONE).astype(np.int64)
    return np.concatenate([lower, ONE - lower[::-1]])
