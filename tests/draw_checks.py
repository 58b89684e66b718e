"""What tests of draws share: parameters of a recipe, keys with a wanted draw, and whether counts fit probabilities."""

import numpy as np
from numba import njit
from scipy import stats

from pipeline.recipe import ViewRecipe
from pipeline.views.draws import ONE, draw_below, stream
from pipeline.views.parameters import ViewParameters, view_parameters


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
