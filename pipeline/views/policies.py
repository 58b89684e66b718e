"""Which operations a view gets, and how strong: RandAugment, AutoAugment, TrivialAugment, ThreeAugment, jitter.

A plan is int64 [PLAN_LENGTH, 2]: the operations in their order, each with its argument, an integer in the unit that
its kernel takes. Lengths are relative to the view's side, so that the same view can be rendered at any size.

Word numbers: 128 + 8k .. for operation k of a policy (choice, whether, strength, sign), 256 .. for color jitter
(three for its order, then one for each strength).
"""

import numpy as np

from softshard.pipeline.views.kernels.color import FACTOR_BITS
from softshard.pipeline.views.kernels.jit import compiled
from softshard.pipeline.views.kernels.rng import ONE, QUANTILES, draw_below
from softshard.pipeline.views.kernels.spatial import DEGREE, RADIUS_BITS

# RandAugment draws from the first fifteen, in timm's order.
AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, SATURATION, CONTRAST, BRIGHTNESS = range(10)
SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, GRAY, BLUR, HUE, IDENTITY = range(10, 19)
RAND_OPERATIONS = 15
OPERATION_NAMES = (
    "auto contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize add", "saturation", "contrast",
    "brightness", "sharpness", "shear x", "shear y", "translate x", "translate y", "gray", "blur", "hue", "identity",
)  # fmt: skip

RAND, AUTO, TRIVIAL, THREE = range(1, 5)  # in the order of the recipe's POLICIES; 0 is none
PLAN_LENGTH = 16
POLICY_WORD, JITTER_WORD = 128, 256
LEVELS = 10  # timm's strengths go from 0 to 10
DECREASING, INCREASING, ORIGINAL = range(3)  # how a level becomes an argument
FACTOR = 1 << FACTOR_BITS
BLUR_UNIT = 224  # blur radii are pixels at this size, and scaled to others
TRANSLATE = 224  # so are TrivialAugment's translations, of up to 32 pixels

# timm's table of the ImageNet policy (arXiv 1805.09501): operation, probability in tenths, level; two in a row.
AUTO_ORIGINAL = np.array(
    [
        [(POSTERIZE, 4, 8), (ROTATE, 6, 9)],
        [(SOLARIZE, 6, 5), (AUTO_CONTRAST, 6, 5)],
        [(EQUALIZE, 8, 8), (EQUALIZE, 6, 3)],
        [(POSTERIZE, 6, 7), (POSTERIZE, 6, 6)],
        [(EQUALIZE, 4, 7), (SOLARIZE, 2, 4)],
        [(EQUALIZE, 4, 4), (ROTATE, 8, 8)],
        [(SOLARIZE, 6, 3), (EQUALIZE, 6, 7)],
        [(POSTERIZE, 8, 5), (EQUALIZE, 10, 2)],
        [(ROTATE, 2, 3), (SOLARIZE, 6, 8)],
        [(EQUALIZE, 6, 8), (POSTERIZE, 4, 6)],
        [(ROTATE, 8, 8), (SATURATION, 4, 0)],
        [(ROTATE, 4, 9), (EQUALIZE, 6, 2)],
        [(EQUALIZE, 0, 7), (EQUALIZE, 8, 8)],
        [(INVERT, 6, 4), (EQUALIZE, 10, 8)],
        [(SATURATION, 6, 4), (CONTRAST, 10, 8)],
        [(ROTATE, 8, 8), (SATURATION, 10, 2)],
        [(SATURATION, 8, 8), (SOLARIZE, 8, 7)],
        [(SHARPNESS, 4, 7), (INVERT, 6, 8)],
        [(SHEAR_X, 6, 5), (EQUALIZE, 10, 9)],
        [(SATURATION, 4, 0), (EQUALIZE, 6, 3)],
        [(EQUALIZE, 4, 7), (SOLARIZE, 2, 4)],
        [(SOLARIZE, 6, 5), (AUTO_CONTRAST, 6, 5)],
        [(INVERT, 6, 4), (EQUALIZE, 10, 8)],
        [(SATURATION, 6, 4), (CONTRAST, 10, 8)],
        [(EQUALIZE, 8, 8), (EQUALIZE, 6, 3)],
    ],
    np.int64,
)
TRIVIAL_OPERATIONS = np.array(
    [
        IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, SATURATION, CONTRAST, SHARPNESS,
        POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE,
    ]
)  # fmt: skip


@compiled
def plan_operations(p, state, plan):
    """Fill a plan with the operations of a view, whose stream is `state`; returns how many they are."""
    count = 0
    if p.policy == RAND:
        count = _rand_augment(p, state, plan)
    elif p.policy == AUTO:
        count = _auto_augment(state, plan)
    elif p.policy == TRIVIAL:
        count = _trivial_augment(p, state, plan)
    elif p.policy == THREE:
        count = _three_augment(state, plan)
    return _color_jitter(p, state, plan, count)


@compiled
def _add(plan, count, operation, argument):
    plan[count, 0], plan[count, 1] = operation, argument
    return count + 1


@compiled
def _rand_augment(p, state, plan):
    count = 0
    for k in range(p.operations):
        word = POLICY_WORD + 8 * k
        operation = draw_below(state, word, RAND_OPERATIONS)
        if draw_below(state, word + 1, ONE) < p.probability:
            noise = p.deviation * p.normal[draw_below(state, word + 2, QUANTILES)] // ONE
            level = min(max(p.magnitude + noise, np.int64(0)), np.int64(LEVELS * ONE))
            sign = 1 - 2 * draw_below(state, word + 3, 2)
            count = _add(plan, count, operation, level_argument(operation, level, sign, p.increasing))
    return count


@compiled
def _auto_augment(state, plan):
    count = 0
    pair = AUTO_ORIGINAL[draw_below(state, POLICY_WORD, len(AUTO_ORIGINAL))]
    for k in range(2):
        word = POLICY_WORD + 8 * k
        operation, tenths, level = pair[k]
        if draw_below(state, word + 1, 10) < tenths:
            sign = 1 - 2 * draw_below(state, word + 3, 2)
            count = _add(plan, count, operation, level_argument(operation, level * ONE, sign, ORIGINAL))
    return count


@compiled
def _nearest(numerator, denominator):
    return (2 * numerator + denominator) // (2 * denominator)


@compiled
def level_argument(operation, level, sign, scale):
    """timm's LEVEL_TO_ARG: the argument of an operation at a level from 0 to 10, in units of 1 / ONE. Whole-numbered
    arguments round down, as timm's do, the others to the nearest unit."""
    full = LEVELS * ONE
    if operation == ROTATE:
        return sign * _nearest(level * 30 * DEGREE, full)
    if operation in (SHEAR_X, SHEAR_Y):
        return sign * _nearest(level * 3, 100)
    if operation in (TRANSLATE_X, TRANSLATE_Y):
        return sign * _nearest(level * 45, 1000)
    if operation == POSTERIZE:
        bits = level * 4 // full
        return 4 - bits if scale == INCREASING else bits + 4 if scale == ORIGINAL else bits
    if operation == SOLARIZE:
        threshold = level * 256 // full
        return 256 - threshold if scale == INCREASING else threshold
    if operation == SOLARIZE_ADD:
        return level * 110 // full
    if operation in (SATURATION, CONTRAST, BRIGHTNESS, SHARPNESS):
        if scale == INCREASING:
            return FACTOR + sign * _nearest(9 * level * FACTOR, 10 * full)
        return _nearest((18 * level + full) * FACTOR, 10 * full)
    return np.int64(0)


@compiled
def _trivial_augment(p, state, plan):
    """torchvision's TrivialAugmentWide (arXiv 2103.10158): one operation, any of `bins` strengths. Translations are not
    cut to whole pixels, since a view has no size."""
    operation = TRIVIAL_OPERATIONS[draw_below(state, POLICY_WORD, len(TRIVIAL_OPERATIONS))]
    step, last = draw_below(state, POLICY_WORD + 2, p.bins), p.bins - 1
    sign = 1 - 2 * draw_below(state, POLICY_WORD + 3, 2)
    argument = np.int64(0)
    if operation in (SHEAR_X, SHEAR_Y):
        argument = sign * _nearest(step * 99 * ONE, 100 * last)
    elif operation in (TRANSLATE_X, TRANSLATE_Y):
        argument = sign * _nearest(step * 32 * ONE, TRANSLATE * last)
    elif operation == ROTATE:
        argument = sign * _nearest(step * 135 * DEGREE, last)
    elif operation in (BRIGHTNESS, SATURATION, CONTRAST, SHARPNESS):
        argument = FACTOR + sign * _nearest(step * 99 * FACTOR, 100 * last)
    elif operation == POSTERIZE:
        lost = _nearest(6 * step, last)
        tie = 12 * step + last == 2 * last * lost
        argument = 8 - lost + (lost % 2 if tie else 0)  # halves round to even numbers, as torch's do
    elif operation == SOLARIZE:
        argument = -(-255 * (last - step) // last)  # rounded up: what is below 8.5 is below 9
    return np.int64(0) if operation == IDENTITY else _add(plan, 0, operation, argument)


@compiled
def _three_augment(state, plan):
    """DeiT III (arXiv 2204.07118); blur with a radius between 0.1 and 2 pixels."""
    choice = draw_below(state, POLICY_WORD, 3)
    if choice == 0:
        return _add(plan, 0, GRAY, 0)
    if choice == 1:
        return _add(plan, 0, SOLARIZE, 128)
    unit = 1 << RADIUS_BITS
    return _add(plan, 0, BLUR, unit // 10 + draw_below(state, POLICY_WORD + 2, 2 * unit - unit // 10 + 1))


@compiled
def _color_jitter(p, state, plan, count):
    """torchvision's ColorJitter: factors uniform around 1, in a random order."""
    order = np.array([BRIGHTNESS, CONTRAST, SATURATION, HUE])
    for last in range(3, 0, -1):
        other = draw_below(state, JITTER_WORD + last - 1, last + 1)
        order[last], order[other] = order[other], order[last]
    for operation in order:
        place = (operation == CONTRAST) + 2 * (operation == SATURATION) + 3 * (operation == HUE)
        strength = p.jitter[place]
        if strength > 0:
            change = draw_below(state, JITTER_WORD + 3 + place, 2 * strength + 1) - strength
            if operation == HUE:
                argument = (abs(change) * 255 // ONE) * (1 if change > 0 else -1) & 255  # towards 0, as a byte
            else:
                argument = FACTOR + (change * FACTOR + ONE // 2) // ONE
            count = _add(plan, count, operation, argument)
    return count
