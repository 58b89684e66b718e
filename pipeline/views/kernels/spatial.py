"""Kernels that move or mix pixels: from `source` to `target`, two uint8 [H, W, 3] arrays, C-contiguous.

Every kernel is a pure function of its integer arguments, the same on every machine, and equals Pillow bit for bit
given the same numbers. Affine maps are six coefficients (a, b, c, d, e, f), multiples of 2**-COEFFICIENT_BITS: the
target pixel (x, y) shows the source at (a (x + .5) + b (y + .5) + c, d (x + .5) + e (y + .5) + f).
"""

import math

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.views.kernels.color import interpolate
from softshard.pipeline.views.kernels.jit import compiled

COEFFICIENT_BITS = 20
DEGREE = 64  # angles are multiples of 1 / DEGREE degrees
RADIUS_BITS = 10
BLUR_PASSES = 3

_UNIT = 1 << COEFFICIENT_BITS
_POSITION_BITS = COEFFICIENT_BITS + 1  # halves of pixels
_POSITION = 1 << _POSITION_BITS


def sine_table() -> NDArray[np.int64]:
    """sin of 0 .. 90 degrees. No value is so near the middle of two integers that a C library could tip it over."""
    steps = 90 * DEGREE
    return np.array([round(_UNIT * math.sin(math.pi / 2 * k / steps)) for k in range(steps + 1)], np.int64)


_SINES = sine_table()


@compiled
def sine(angle):
    """Of an angle in 1 / DEGREE degrees, in COEFFICIENT_BITS; exact at multiples of 90 degrees."""
    quarter = 90 * DEGREE
    angle = angle % (4 * quarter)
    sign = 1 if angle < 2 * quarter else -1
    angle = angle % (2 * quarter)
    return sign * _SINES[min(angle, 2 * quarter - angle)]


@compiled
def rotation(angle, height, width):
    """Coefficients of a counter-clockwise turn about the center by `angle` / DEGREE degrees, as Image.rotate has."""
    sin, cos = sine(angle), sine(angle + 90 * DEGREE)
    across = (_UNIT * width - cos * width + sin * height) >> 1
    down = (_UNIT * height - sin * width - cos * height) >> 1
    return cos, -sin, across, sin, cos, down


@compiled
def affine(source, target, a, b, c, d, e, f, fill):
    """Bilinear; `fill`, three integers, where the source position is outside the image.

    Pillow's doubles are exact for such coefficients, and so is this arithmetic: positions have 21 fractional bits,
    the value between four pixels 42, of which Pillow drops all. Row by row, in loops that vectorize but for the
    middle one, which fetches the four pixels.
    """
    width, stride = target.shape[1], 3 * target.shape[1]
    flat, out = source.reshape(-1), target.reshape(-1)
    first, right, down = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
    part_x, part_y = np.empty(width, np.int32), np.empty(width, np.int32)
    corners = np.empty((4, width), np.uint32)
    background = np.uint32(fill[0]) | np.uint32(fill[1] << 8) | np.uint32(fill[2] << 16)
    for y in range(target.shape[0]):
        start = a + b * (2 * y + 1) + 2 * c, d + e * (2 * y + 1) + 2 * f
        _locate(start, (2 * a, 2 * d), source.shape[0], source.shape[1], first, right, down, part_x, part_y)
        for x in range(width):
            if first[x] < 0:
                corners[:, x] = background
                continue
            corner, below = np.uint64(first[x]), np.uint64(first[x] + down[x])
            across = np.uint64(right[x])
            corners[0, x] = _pixel(flat, corner)
            corners[1, x] = _pixel(flat, corner + across)
            corners[2, x] = _pixel(flat, below)
            corners[3, x] = _pixel(flat, below + across)
        _mix(corners[0], corners[1], corners[2], corners[3], part_x, part_y, out[y * stride : (y + 1) * stride])


@compiled
def _locate(start, step, height, width, first, right, down, part_x, part_y):
    """For a row of target pixels: where the upper left of the four source pixels begins (-1 if the position is
    outside), how far it is to the right and the lower ones, and the position between them."""
    half, mask = np.int64(_POSITION // 2), np.int64(_POSITION - 1)
    for x in range(first.size):
        at_x, at_y = start[0] + x * step[0], start[1] + x * step[1]
        inside = (at_x >= 0) & (at_x < width << _POSITION_BITS) & (at_y >= 0) & (at_y < height << _POSITION_BITS)
        left, above = (at_x - half) >> _POSITION_BITS, (at_y - half) >> _POSITION_BITS
        part_x[x], part_y[x] = (at_x - half) & mask, (at_y - half) & mask
        column, line = min(max(left, 0), width - 1), min(max(above, 0), height - 1)
        first[x] = 3 * (line * width + column) if inside else -1
        right[x] = 3 * (min(max(left + 1, 0), width - 1) - column)
        down[x] = 3 * width * (min(max(above + 1, 0), height - 1) - line)


@compiled
def _pixel(flat, i):
    green, blue = np.uint32(flat[i + np.uint64(1)]), np.uint32(flat[i + np.uint64(2)])
    return np.uint32(np.uint32(flat[i]) | green << np.uint32(8) | blue << np.uint32(16))


@compiled
def _mix(upper_left, upper_right, lower_left, lower_right, part_x, part_y, row):
    for x in range(part_x.size):
        for channel in range(3):
            shift = np.uint32(8 * channel)
            upper = _between(upper_left[x] >> shift, upper_right[x] >> shift, part_x[x])
            lower = _between(lower_left[x] >> shift, lower_right[x] >> shift, part_x[x])
            # Exact in double, with or without contraction: 51 bits.
            value = np.float64(upper) + np.float64(np.int32(lower - upper)) * (np.float64(part_y[x]) / _POSITION)
            row[3 * x + channel] = np.int32(value / _POSITION)


@compiled
def _between(left, right, part):
    left, right = np.int32(left & np.uint32(255)), np.int32(right & np.uint32(255))
    return np.int32(np.int32(left << _POSITION_BITS) + np.int32(np.int32(right - left) * part))


@compiled
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
            center = np.int32(row[i + 3])
            total = np.int32(above[i]) + np.int32(above[i + 3]) + np.int32(above[i + 6])
            total += np.int32(row[i]) + 5 * center + np.int32(row[i + 6])
            total += np.int32(below[i]) + np.int32(below[i + 3]) + np.int32(below[i + 6])
            smooth = np.int32(np.int32(np.int32(total + 6) * 5042) >> 16)  # = (total + 6) // 13 up to 255 * 13 + 6
            result[i + 3] = interpolate(smooth, center, factor)


@compiled
def gaussian_blur(source, target, scratch, radius):
    """Pillow's GaussianBlur(radius / 2**RADIUS_BITS): three box blurs along the rows, three along the columns.

    `scratch` is an image of the same shape. Every pass rounds to uint8, as Pillow's do.
    """
    reach, whole, part = _box(radius)
    height, stride = source.shape[0], 3 * source.shape[1]
    flat, out, spare = source.reshape(-1), target.reshape(-1), scratch.reshape(-1)
    total = np.empty(stride, np.uint32)
    padding = 3 * (reach + 1)
    padded = np.empty(stride + 2 * padding, np.uint8)
    for y in range(height):
        row, result = flat[y * stride : (y + 1) * stride], spare[y * stride : (y + 1) * stride]
        for _ in range(BLUR_PASSES):
            _blur_row(row, padded, reach, whole, part, total, result)
            row = result
    _blur_columns(spare, out, height, reach, whole, part, total)
    _blur_columns(out, spare, height, reach, whole, part, total)
    _blur_columns(spare, out, height, reach, whole, part, total)


@compiled
def _box(radius):
    """(reach, weight of the 2 * reach + 1 pixels within, weight of the two beyond), in 2**-24.

    Each operation in the precision that Pillow's C has there, because the weights depend on the last bit.
    """
    one, two = np.float32(1), np.float32(2)
    sigma = np.float32(radius / (1 << RADIUS_BITS))
    variance = np.float32(np.float32(sigma * sigma) / np.float32(BLUR_PASSES))
    length = np.float32(np.sqrt(12.0 * np.float64(variance) + 1.0))
    low = np.float32(np.floor((np.float64(length) - 1.0) / 2.0))
    rest = (two * low + one) * (low * (low + one) - np.float32(3) * variance)
    box = low + rest / (np.float32(6) * (variance - (low + one) * (low + one)))
    reach = np.int64(box)
    whole = np.int64(np.float32(1 << 24) / (box * two + one))
    return reach, np.uint32(whole), np.uint32(((1 << 24) - (2 * reach + 1) * whole) // 2)


@compiled
def _blur_row(row, padded, reach, whole, part, total, result):
    """One pass along a row, whose first and last pixels go on beyond it."""
    padding = 3 * (reach + 1)
    for i in range(padding):
        padded[i] = row[i % 3]
        padded[padding + row.size + i] = row[row.size - 3 + i % 3]
    padded[padding : padding + row.size] = row
    total[:] = 0
    for first in range(3, 6 * (reach + 1), 3):
        _add(total, padded[first : first + row.size])
    _weigh(total, padded[: row.size], padded[2 * padding :], whole, part, result)


@compiled
def _blur_columns(flat, out, height, reach, whole, part, total):
    """One pass along all columns, whose first and last pixels go on beyond them."""
    stride = total.size
    total[:] = 0
    for y in range(-reach - 1, reach):
        _add(total, _row(flat, y, height, stride))
    for y in range(height):
        near, far = _row(flat, y - reach - 1, height, stride), _row(flat, y + reach + 1, height, stride)
        _subtract(total, near)
        _add(total, _row(flat, y + reach, height, stride))
        _weigh(total, near, far, whole, part, out[y * stride : (y + 1) * stride])


@compiled
def _row(flat, y, height, stride):
    y = min(max(y, 0), height - 1)
    return flat[y * stride : (y + 1) * stride]


@compiled
def _add(total, values):
    for i in range(total.size):
        total[i] += np.uint32(values[i])


@compiled
def _subtract(total, values):
    for i in range(total.size):
        total[i] -= np.uint32(values[i])


@compiled
def _weigh(total, near, far, whole, part, result):
    half = np.uint32(1 << 23)
    for i in range(total.size):
        ends = np.uint32(np.uint32(near[i]) + np.uint32(far[i]))
        value = np.uint32(np.uint32(total[i] * whole) + np.uint32(ends * part) + half)
        result[i] = np.uint8(value >> np.uint32(24))
