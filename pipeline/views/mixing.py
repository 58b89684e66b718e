"""Boxes and lams: what RandomErasing erases, and what Mixup and CutMix take from another image.

Word numbers: 320 whether to erase, 384 + 64n .. for box n (four for each try, the last for its noise), 2048 .. for
mixing (which kind, whether, lam, partner, center of the box).
"""

import numpy as np

from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.kernels.jit import compiled
from softshard.pipeline.views.kernels.rng import ASPECTS, ONE, QUANTILES, draw, draw_below, stream

ERASE_WORD, ERASE_BOX_WORD, ERASE_TRIES = 320, 384, 10
MIX_WORD = 2048
UNMIXED, MIXUP, CUTMIX = range(3)


@compiled
def erasures(p, state):
    """How many boxes of a view are to be erased."""
    return p.erase_count if draw_below(state, ERASE_WORD, ONE) < p.erase else np.int64(0)


@compiled
def erase_box(p, state, number, size):
    """(top, left, height, width) of box `number` of a view of size x size pixels: area and log aspect uniform, ten
    tries, then none (timm.data.random_erasing). Whether a box fits does not depend on the size."""
    for attempt in range(ERASE_TRIES):
        word = ERASE_BOX_WORD + 64 * number + 4 * attempt
        area = p.erase_low + draw_below(state, word, p.erase_high - p.erase_low + 1)
        side = np.sqrt(np.float64(area) / np.float64(ONE * p.erase_count))
        aspect = np.float64(p.erase_aspect[draw_below(state, word + 1, ASPECTS)]) / ONE
        if side * aspect < 1 and side / aspect < 1:
            height, width = np.int64(side * aspect * size + 0.5), np.int64(side / aspect * size + 0.5)
            top, left = draw_below(state, word + 2, size - height + 1), draw_below(state, word + 3, size - width + 1)
            return top, left, height, width
    return np.int64(0), np.int64(0), np.int64(0), np.int64(0)


@compiled
def erase_noise_state(state, number):
    """The stream of the noise in box `number`."""
    return draw(state, ERASE_BOX_WORD + 64 * number + 63)


@compiled
def mix_kind(p, state):
    """Mixup, CutMix or neither; where a recipe has both, a coin decides which one may act."""
    coin = draw_below(state, MIX_WORD, 2)
    kind = CUTMIX if p.mixup < 0 or (p.cutmix >= 0 and coin == 1) else MIXUP
    wanted = p.cutmix if kind == CUTMIX else p.mixup
    return kind if draw_below(state, MIX_WORD + 1, ONE) < wanted else UNMIXED


@compiled
def mix_lam(p, state, kind):
    """The lam of the image itself, drawn from Beta(alpha, alpha), in units of 1 / ONE."""
    lams = p.cutmix_lams if kind == CUTMIX else p.mixup_lams
    return lams[draw_below(state, MIX_WORD + 2, QUANTILES)]


@compiled
def cut_box(state, lam, size):
    """(top, left, height, width) of the box taken from the partner (arXiv 1905.04899, timm's rand_bbox): its center is
    uniform, what lies outside the view is cut off."""
    side = np.int64(np.sqrt(np.float64(ONE - lam) / ONE) * size)
    down, across = draw_below(state, MIX_WORD + 4, size), draw_below(state, MIX_WORD + 5, size)
    top, left = max(np.int64(0), down - side // 2), max(np.int64(0), across - side // 2)
    bottom, right = min(size, down + (side + 1) // 2), min(size, across + (side + 1) // 2)
    return top, left, bottom - top, right - left


@compiled
def partner(p, key, view, count):
    """The place, among `count` images in the order of their key digests, of the one that a view is mixed with; -1
    when the view is not mixed."""
    if view == CENTER or (p.mixup < 0 and p.cutmix < 0):
        return np.int64(-1)
    state = stream(p.seed, key, view)
    return np.int64(-1) if mix_kind(p, state) == UNMIXED else draw_below(state, MIX_WORD + 3, count)
