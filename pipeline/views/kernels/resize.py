"""Cropping and resizing with Pillow's arithmetic: Image.crop(box).resize((width, size), BILINEAR) along the columns,
then .resize((size, size), BILINEAR) along the rows, bit for bit.

A triangle filter, as wide as the scale where the crop shrinks; each pass rounds to uint8. Weights have 22 fractional
bits and come from IEEE doubles without contraction. Pillow's own order of the passes depends on the shape and on its
version; this one is fixed.
"""

import numpy as np

from softshard.pipeline.views.kernels.jit import compiled

WEIGHT_BITS = 22


@compiled
def resize(image, top, left, height, width, flip, scratch, out):
    """A box of `image`, uint8 [H, W, 3], as `out`, uint8 [S, S, 3], mirrored if `flip`. `scratch` is uint8, with room
    for S * width * 3."""
    size = out.shape[0]
    turned = scratch[: width * size * 3].reshape(width, size * 3)
    _resize_columns(image.reshape(image.shape[0], -1), top, 3 * left, height, False, turned)
    _resize_columns(turned, 0, 0, width, flip, out.reshape(size, size * 3))


@compiled
def _resize_columns(rows, top, start, height, flip, out):
    """Resize `height` rows from `top`, from their value `start` on, along the columns, and turn the result: row y
    becomes column y of `out`, or column S - 1 - y if `flip`. So both passes run along the columns, which vectorizes."""
    pixels, size = out.shape[0], out.shape[1] // 3
    length = 3 * pixels
    first, count, weights = _filter(height, size)
    total, row = np.empty(length, np.int32), np.empty(length, np.uint8)
    for y in range(size):
        for i in range(length):
            total[i] = 1 << (WEIGHT_BITS - 1)
        for k in range(count[y]):
            _add(rows[top + first[y] + k][start : start + length], weights[y, k], total)
        for i in range(length):
            row[i] = min(total[i] >> WEIGHT_BITS, np.int32(255))
        at = 3 * (size - 1 - y if flip else y)
        for x in range(pixels):
            column = out[x]
            column[at] = row[3 * x]
            column[at + 1] = row[3 * x + 1]
            column[at + 2] = row[3 * x + 2]


@compiled
def _add(row, weight, total):
    for i in range(total.size):
        total[i] += weight * np.int32(row[i])


@compiled
def _filter(length, size):
    """For each of `size` pixels: the first of the `length` pixels that it sees, how many they are, their weights."""
    scale = np.float64(length) / np.float64(size)
    reach = max(scale, 1.0)
    taps = 2 * np.int64(np.ceil(reach)) + 1
    first, count, weights = np.empty(size, np.int64), np.empty(size, np.int64), np.empty((size, taps), np.int32)
    share = np.empty(taps, np.float64)
    for i in range(size):
        center = (i + 0.5) * scale
        low = max(np.int64(0), np.int64(center - reach + 0.5))
        high = min(length, np.int64(center + reach + 0.5))
        total = 0.0
        for k in range(high - low):
            distance = abs((k + low - center + 0.5) * (1.0 / reach))
            share[k] = 1.0 - distance if distance < 1.0 else 0.0
            total += share[k]
        for k in range(high - low):
            weights[i, k] = np.int32(0.5 + share[k] / total * (1 << WEIGHT_BITS))
        first[i], count[i] = low, high - low
    return first, count, weights
