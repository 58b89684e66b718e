"""Kernels that move or mix pixels: from `source` to `target`, two uint8 [H, W, 3] arrays, C-contiguous.

Every kernel is a pure function of its integer arguments, the same on every machine, and equals Pillow bit for bit
given the same numbers. Affine maps are six coefficients (a, b, c, d, e, f), multiples of 2**-COEFFICIENT_BITS: the
target pixel (x, y) shows the source at (a (x + .5) + b (y + .5) + c, d (x + .5) + e (y + .5) + f).
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.colour import interpolate

COEFFICIENT_BITS = 20
DEGREE = 64  # angles are multiples of 1 / DEGREE degrees
RADIUS_BITS = 10
BLUR_PASSES = 3

_UNIT = 1 << COEFFICIENT_BITS
_POSITION_BITS = COEFFICIENT_BITS + 1  # halves of pixels
_POSITION = 1 << _POSITION_BITS

kernel = njit(nogil=True, error_model="numpy")


def sine_table() -> NDArray[np.int64]:
    """sin of 0 .. 90 degrees. No value is so near the middle of two integers that a C library could tip it over."""
    steps = 90 * DEGREE
    return np.array([round(_UNIT * math.sin(math.pi / 2 * k / steps)) for k in range(steps + 1)], np.int64)


_SINES = sine_table()


@kernel
def sine(angle):
    """Of an angle in 1 / DEGREE degrees, in COEFFICIENT_BITS; exact at multiples of 90 degrees."""
    quarter = 90 * DEGREE
    angle = angle % (4 * quarter)
    sign = 1 if angle < 2 * quarter else -1
    angle = angle % (2 * quarter)
    return sign * _SINES[min(angle, 2 * quarter - angle)]


@kernel
def rotation(angle, height, width):
    """Coefficients of a counter-clockwise turn about the centre by `angle` / DEGREE degrees, as Image.rotate has."""
    sin, cos = sine(angle), sine(angle + 90 * DEGREE)
    across = (_UNIT * width - cos * width + sin * height) >> 1
    down = (_UNIT * height - sin * width - cos * height) >> 1
    return cos, -sin, across, sin, cos, down


@kernel
def affine(source, target, a, b, c, d, e, f, fill):
    """Bilinear; `fill`, three integers, where the source position is outside the image.

    Pillow's doubles are exact for such coefficients, so that 64-bit integers give its values: positions have 21
    fractional bits, the value between four pixels 42, of which Pillow drops all.
    """
    height, width = source.shape[0], source.shape[1]
    flat = source.reshape(-1)
    red, green, blue = np.uint8(fill[0]), np.uint8(fill[1]), np.uint8(fill[2])
    half, mask = np.int64(_UNIT), np.int64(_POSITION - 1)
    step_x, step_y = 2 * np.int64(a), 2 * np.int64(d)
    for y in range(target.shape[0]):
        row = target[y]
        at_x = a + b * (2 * y + 1) + 2 * c
        at_y = d + e * (2 * y + 1) + 2 * f
        for x in range(target.shape[1]):
            if 0 <= at_x < width << _POSITION_BITS and 0 <= at_y < height << _POSITION_BITS:
                left, above = (at_x - half) >> _POSITION_BITS, (at_y - half) >> _POSITION_BITS
                part_x, part_y = (at_x - half) & mask, (at_y - half) & mask
                first, second = 3 * max(left, 0), 3 * min(left + 1, width - 1)
                upper, lower = 3 * width * max(above, 0), 3 * width * min(above + 1, height - 1)
                for k in range(3):
                    row[x, k] = _between(
                        flat[upper + first + k],
                        flat[upper + second + k],
                        flat[lower + first + k],
                        flat[lower + second + k],
                        part_x,
                        part_y,
                    )
            else:
                row[x, 0] = red
                row[x, 1] = green
                row[x, 2] = blue
            at_x += step_x
            at_y += step_y


@kernel
def _between(upper_left, upper_right, lower_left, lower_right, part_x, part_y):
    one, two = np.int64(upper_left), np.int64(lower_left)
    upper = (one << _POSITION_BITS) + (np.int64(upper_right) - one) * part_x
    lower = (two << _POSITION_BITS) + (np.int64(lower_right) - two) * part_x
    return np.uint8(((upper << _POSITION_BITS) + (lower - upper) * part_y) >> (2 * _POSITION_BITS))


@kernel
def sharpness(source, target, factor):
    """Blend with the image smoothed by ((1 1 1) (1 5 1) (1 1 1)) / 13, whose border is the image's own.

    Sums of thirteenths are never halves, so that integers round as Pillow's floats do.
    """
    height, width = source.shape[0], source.shape[1]
    factor = np.int32(factor)
    stride = 3 * width
    flat, out = source.reshape(-1), target.reshape(-1)
    if height < 3 or width < 3:
        out[:] = flat
        return
    out[:stride] = flat[:stride]
    out[-stride:] = flat[-stride:]
    for y in range(1, height - 1):
        start = y * stride
        above = flat[start - stride : start]
        row = flat[start : start + stride]
        below = flat[start + stride : start + 2 * stride]
        result = out[start : start + stride]
        result[:3] = row[:3]
        result[-3:] = row[-3:]
        for i in range(stride - 6):
            centre = np.int32(row[i + 3])
            total = np.int32(above[i]) + np.int32(above[i + 3]) + np.int32(above[i + 6])
            total += np.int32(row[i]) + 5 * centre + np.int32(row[i + 6])
            total += np.int32(below[i]) + np.int32(below[i + 3]) + np.int32(below[i + 6])
            smooth = np.int32(np.int32(np.int32(total + 6) * 5042) >> 16)  # = (total + 6) // 13 up to 255 * 13 + 6
            result[i + 3] = interpolate(smooth, centre, factor)
