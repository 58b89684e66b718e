"""What tests of draws lam: parameters of a recipe, keys with a wanted draw, whether counts fit probabilities, and the
functions without the compiler."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numba import njit
from scipy import stats

from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.views import geometry, mixing, policies
from softshard.pipeline.views.kernels import rng
from softshard.pipeline.views.kernels.rng import ONE, draw_below, stream
from softshard.pipeline.views.parameters import ViewParameters, view_parameters


def parameters_of(seed: int = 0, **parts) -> ViewParameters:
    return view_parameters(ViewRecipe(seed=seed, count=1, **parts))


@njit
def key_of_draw(number, wanted):
    """A key for which word `number` gives this draw, of seed 0 and view 0."""
    key = 0
    while draw_below(stream(np.uint64(0), key, 0), number, ONE) != wanted:
        key += 1
    return key


def assert_frequencies(counts, expected) -> None:
    """Chi squared, p = 0.0001."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert counts.shape == expected.shape
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-4


@contextmanager
def uncompiled() -> Iterator[pytest.MonkeyPatch]:
    """Within it, every compiled function of the parameter modules is its source, with Python's own integers and
    doubles, which nothing fuses or reorders: call them through their modules, and patch them further with what it
    gives."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        for module in (rng, geometry, policies, mixing):
            for name, value in list(vars(module).items()):
                if hasattr(value, "py_func"):
                    patch.setattr(module, name, value.py_func)
        yield patch
