"""Kernels that change the colors of an image in place: uint8 [H, W, 3], RGB, C-contiguous.

Every kernel is a pure function of its integer arguments and the same on every machine. Those that Pillow has equal
Pillow bit for bit. Factors are multiples of 2**-FACTOR_BITS, at most 4: then each step of Pillow's float32 blend is
exact wherever its result is not clipped, and integers give the same. The loops are written for LLVM to vectorize:
flat indices, no branches, and 32-bit arithmetic in functions of its own, which LLVM narrows before it inlines them.
"""

import numpy as np
from numba import njit

from softshard.pipeline.views.kernels.jit import compiled
from softshard.pipeline.views.kernels.rng import draw

FACTOR_BITS = 14
WEIGHT_BITS = 16
NOISE_BITS = 10  # a noise table has 1 << NOISE_BITS entries a channel


@compiled
def invert(image):
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = 255 - flat[i]


@compiled
def posterize(image, bits):
    """Keep the `bits` highest bits: none gives black, 8 or more everything."""
    mask = np.uint8(256 - (1 << max(0, 8 - bits)))
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] &= mask


@compiled
def solarize(image, threshold):
    """Invert what is not below the threshold (0 to 256)."""
    threshold = np.int32(threshold)
    flat = image.reshape(-1)
    for i in range(flat.size):
        value = flat[i]
        flat[i] = value if value < threshold else 255 - value


@compiled
def solarize_add(image, add):
    """Add to what is below 128; `add` from 0 to 255."""
    add = np.int32(add)
    flat = image.reshape(-1)
    for i in range(flat.size):
        value = flat[i]
        flat[i] = min(np.int32(255), np.int32(value + add)) if value < 128 else value


@compiled
def auto_contrast(image):
    """Stretch each channel from its extremes to 0 and 255."""
    lows, highs = _extremes(image)
    table = np.empty((3, 256), np.uint8)
    for channel in range(3):
        low, high = lows[channel], highs[channel]
        # Pillow's own double arithmetic: int(value * scale + offset) can be one less than the exact quotient.
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        for value in range(256):
            table[channel, value] = min(max(np.int64(value * scale + offset), 0), 255)
    _look_up(image, table)


@compiled
def equalize(image):
    """Flatten each channel's histogram."""
    counts = _histogram(image)
    table = np.empty((3, 256), np.uint8)
    for channel in range(3):
        last = 255
        while last > 0 and counts[channel, last] == 0:
            last -= 1
        step = (image.shape[0] * image.shape[1] - counts[channel, last]) // 255
        below = step // 2
        for value in range(256):
            table[channel, value] = min(below // step, 255) if step else value
            below += counts[channel, value]
    _look_up(image, table)


@compiled
def brightness(image, factor):
    """Blend with black."""
    factor = np.int32(factor)
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = interpolate(np.int32(0), np.int32(flat[i]), factor)


@compiled
def contrast(image, factor):
    """Blend with the mean gray."""
    count = image.shape[0] * image.shape[1]
    flat = image.reshape(-1)
    total = np.int64(0)
    for i in range(count):
        total += luma(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2])
    mean, factor = np.int32((2 * total + count) // (2 * count)), np.int32(factor)
    for i in range(flat.size):
        flat[i] = interpolate(mean, np.int32(flat[i]), factor)


@compiled
def saturation(image, factor):
    """Blend with the gray image."""
    factor = np.int32(factor)
    flat = image.reshape(-1)
    for i in range(flat.size // 3):
        shade = luma(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2])
        for channel in range(3):
            flat[3 * i + channel] = interpolate(shade, np.int32(flat[3 * i + channel]), factor)


@compiled
def gray(image):
    flat = image.reshape(-1)
    for i in range(flat.size // 3):
        shade = np.uint8(luma(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]))
        for channel in range(3):
            flat[3 * i + channel] = shade


@compiled
def hue(image, shift):
    """Turn the hue by shift / 256 of the circle, shift in 0 .. 255: torchvision's adjust_hue on a Pillow image.

    Floats and doubles where Pillow's C code has them, every operation rounded by itself, so that the uint8 hue and
    saturation in between are Pillow's.
    """
    shift = np.int32(shift)
    flat = image.reshape(-1)
    for i in range(flat.size // 3):
        turned, saturated, high = _to_hsv(np.int32(flat[3 * i]), np.int32(flat[3 * i + 1]), np.int32(flat[3 * i + 2]))
        red, green, blue = _to_rgb(np.int32(np.int32(turned + shift) & np.int32(255)), saturated, high)
        flat[3 * i], flat[3 * i + 1], flat[3 * i + 2] = red, green, blue


@compiled
def fill(image, top, left, height, width, color):
    """Give a box one color."""
    flat, stride, length = image.reshape(-1), 3 * image.shape[1], 3 * width
    first = top * stride + 3 * left
    for y in range(height):
        row = flat[first + y * stride : first + y * stride + length]
        if y > 0:
            _copy(flat[first : first + length], row)
            continue
        for x in range(width):
            row[3 * x], row[3 * x + 1], row[3 * x + 2] = color[0], color[1], color[2]


@compiled
def noise(image, top, left, height, width, state, table):
    """Fill a box with noise: bits 0-9, 10-19 and 20-29 of word y * width + x of the stream `state` choose the red,
    green and blue of the box's pixel (x, y) from `table`, uint8 [3, 1024], quantiles of the distribution wanted."""
    mask = np.uint64((1 << NOISE_BITS) - 1)
    for y in range(height):
        row = image[top + y]
        for x in range(width):
            word = draw(state, y * width + x)
            for channel in range(3):
                row[left + x, channel] = table[channel, (word >> np.uint64(channel * NOISE_BITS)) & mask]


@compiled
def blend(image, other, weight):
    """Mixup: `weight` / 2**WEIGHT_BITS of the image and the rest of the other, rounded."""
    ours, theirs = np.int32(weight), np.int32((1 << WEIGHT_BITS) - weight)
    flat, others = image.reshape(-1), other.reshape(-1)
    for i in range(flat.size):
        flat[i] = _weighted(ours, np.int32(flat[i]), theirs, np.int32(others[i]))


@compiled
def paste(image, other, top, left, height, width):
    """CutMix: a box of the other image, at the same place."""
    flat, others = image.reshape(-1), other.reshape(-1)
    for y in range(top, top + height):
        start, stop = 3 * (y * image.shape[1] + left), 3 * (y * image.shape[1] + left + width)
        _copy(others[start:stop], flat[start:stop])


@compiled
def _copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@compiled
def _weighted(ours, value, theirs, other):
    total = np.int32(np.int32(ours * value) + np.int32(theirs * other) + np.int32(1 << (WEIGHT_BITS - 1)))
    return np.uint8(total >> WEIGHT_BITS)


@compiled
def interpolate(start, end, factor):
    """Pillow's blend, which truncates: start + factor * (end - start), clipped."""
    value = np.int32(np.int32(start << FACTOR_BITS) + np.int32(factor * np.int32(end - start))) >> FACTOR_BITS
    return np.uint8(min(max(np.int32(value), np.int32(0)), np.int32(255)))


@compiled
def luma(red, green, blue):
    """Pillow's convert("L")."""
    red, green, blue = np.int32(red), np.int32(green), np.int32(blue)
    return np.int32(np.int32(19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16)


@compiled
def _extremes(image):
    """The least and the greatest value of each channel, through 64 lanes a channel."""
    lanes = 3 * 64
    low, high = np.full(lanes, 255, np.uint8), np.zeros(lanes, np.uint8)
    flat = image.reshape(-1)
    for start in range(0, flat.size, lanes):
        part = flat[start : start + lanes]
        for i in range(part.size):
            low[i] = min(low[i], part[i])
            high[i] = max(high[i], part[i])
    lows, highs = np.full(3, 255, np.int64), np.zeros(3, np.int64)
    for i in range(lanes):
        lows[i % 3] = min(lows[i % 3], np.int64(low[i]))
        highs[i % 3] = max(highs[i % 3], np.int64(high[i]))
    return lows, highs


@compiled
def _histogram(image):
    """Counts, int32 [3, 256]. Even and odd pixels are counted apart: adding twice in a row to one count stalls."""
    counts = np.zeros((6, 256), np.int32)
    flat = image.reshape(-1)
    pairs = flat.size // 6
    for i in range(pairs):
        for j in range(6):
            counts[j, flat[6 * i + j]] += 1
    for i in range(6 * pairs, flat.size):
        counts[i - 6 * pairs, flat[i]] += 1
    return counts[:3] + counts[3:]


@compiled
def _look_up(image, table):
    flat = image.reshape(-1)
    for i in range(flat.size // 3):
        for channel in range(3):
            flat[3 * i + channel] = table[channel, flat[3 * i + channel]]


@compiled
def _to_hsv(red, green, blue):
    """Pillow's rgb2hsv_row. Branchless: black and grays come out with hue 0 and saturation 0 too."""
    high, low = max(red, max(green, blue)), min(red, min(green, blue))
    chroma = np.float32(max(np.int32(high - low), np.int32(1)))
    reds, greens = np.float32(np.int32(high - red)) / chroma, np.float32(np.int32(high - green)) / chroma
    blues = np.float32(np.int32(high - blue)) / chroma
    if red == high:
        sixths = np.float64(np.float32(blues - greens))
    elif green == high:
        sixths = np.float64(np.float32(2.0 + np.float64(reds) - np.float64(blues)))
    else:
        sixths = np.float64(np.float32(4.0 + np.float64(greens) - np.float64(reds)))
    turn = sixths / 6.0 + 1.0
    turn = np.float64(np.float32(turn - 1.0 if turn >= 1.0 else turn))
    share = np.float64(np.float32(np.int32(high - low)) / np.float32(max(high, np.int32(1))))
    return np.int32(turn * 255.0), np.int32(share * 255.0), high


@njit(nogil=True, error_model="numpy", inline="always")  # compiled by itself it becomes a switch: not vectorized
def _to_rgb(turned, saturated, high):
    """Pillow's hsv2rgb."""
    sixths = np.float64(turned) * 6.0 / 255.0
    sector = np.int32(sixths)
    rest = np.float32(sixths - np.float64(sector))
    share = np.float32(np.float64(saturated) / 255.0)
    value = np.float64(high)
    p = _rounded(value * (1.0 - np.float64(share)))
    q = _rounded(value * (1.0 - np.float64(np.float32(share * rest))))
    t = _rounded(value * (1.0 - np.float64(share) * (1.0 - np.float64(rest))))
    sector = np.int32(0) if sector == 6 else sector
    red = high if (sector == 0) | (sector == 5) else (q if sector == 1 else (t if sector == 4 else p))
    green = high if (sector == 1) | (sector == 2) else (q if sector == 3 else (t if sector == 0 else p))
    blue = high if (sector == 3) | (sector == 4) else (q if sector == 5 else (t if sector == 2 else p))
    return red, green, blue


@compiled
def _rounded(value):
    """C's round: to the nearest, halves up."""
    whole = np.int32(value)
    return np.int32(whole + np.int32(1)) if value - np.float64(whole) >= 0.5 else whole
