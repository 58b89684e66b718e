"""Views: pixels as a pure function of (view recipe, seed, key digest, view number, output size).

Randomness is counter-based: a stream of splitmix64 words (Steele, Lea, Flood 2014) keyed by (seed, key, view), in
which every decision reads words of fixed numbers. So a view does not depend on worker, batch, rank, epoch or on what
was drawn before. Parameters use integers, IEEE square roots and tables made with correctly rounded decimals; they
are compiled without fastmath and are the same on every machine.

Word numbers: 4t .. 4t+3 for try t of the crop (area, aspect, top, left), 64 for the flip.
"""

import math
from decimal import Context, Decimal
from typing import NamedTuple

import numpy as np
from numba import njit, prange, types
from numpy.typing import NDArray

from pipeline.recipe import ViewRecipe

CENTRE = -1  # the view number of the centre crop that validation uses: no draws
ONE = 1 << 20  # fixed-point fractions have 20 bits
ASPECTS = 4096  # aspect ratios are drawn from this many, evenly spaced in log space
CROP_TRIES = 10
FLIP_WORD = 64
CHANGED = 1  # the status of an image whose bytes are not those that were packed; the JPEG decoder's own is -1

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KEY_SALT = np.uint64(0xD1342543DE82EF95)

# C functions of FFCV and zlib; the loader registers them under these names before the first call.
_imdecode = types.ExternalFunction(
    "softshard_imdecode",
    types.int32(
        types.intp, types.uint64, types.uint32, types.uint32, types.intp, types.uint32, types.uint32,
        types.uint32, types.uint32, types.uint32, types.uint32, types.boolean, types.boolean,
    ),
)  # fmt: skip
_resize = types.ExternalFunction("softshard_resize", types.void(*[types.int64] * 11))
_crc32 = types.ExternalFunction("softshard_crc32", types.uint64(types.uint64, types.intp, types.uint32))  # zlib's


class ViewParameters(NamedTuple):
    """A view recipe as numbers for compiled code. Fractions are multiples of 1 / ONE."""

    seed: np.uint64
    random_crop: np.int64
    scale_low: np.int64
    scale_high: np.int64
    ratio_low: np.int64
    ratio_high: np.int64
    sqrt_aspect: NDArray[np.int64]
    flip: np.int64
    centre: np.int64


def view_parameters(views: ViewRecipe | None, centre: float = 1.0) -> ViewParameters:
    """Numbers of a recipe. `centre` is the side of the centre crop as a fraction of the shorter side of the image;
    without a recipe only the centre view can be rendered."""
    crop = views.crop if views else None
    scale, ratio = (crop.scale, crop.ratio) if crop else ((1.0, 1.0), (1.0, 1.0))
    return ViewParameters(
        seed=np.uint64(views.seed if views else 0),
        random_crop=np.int64(crop is not None),
        scale_low=_fixed(scale[0]),
        scale_high=_fixed(scale[1]),
        ratio_low=_fixed(ratio[0]),
        ratio_high=_fixed(ratio[1]),
        sqrt_aspect=_sqrt_aspects(*ratio),
        flip=_fixed(views.hflip if views else 0.0),
        centre=_fixed(centre),
    )


def centre_fraction(size: int, crop_pct: float) -> float:
    """timm's evaluation: the shorter side becomes floor(size / crop_pct), of which the centre `size` are kept."""
    return size / math.floor(size / crop_pct)


def _fixed(fraction: float) -> np.int64:
    return np.int64(round(fraction * ONE))


def _sqrt_aspects(low: float, high: float) -> NDArray[np.int64]:
    """Square roots of ASPECTS aspect ratios, log-uniform in [low, high]. Decimal rounds exp and ln correctly, which
    the C library does not promise."""
    exact = Context(prec=40)
    start, end = exact.ln(Decimal(low)), exact.ln(Decimal(high))
    step = exact.divide(exact.subtract(end, start), Decimal(2 * ASPECTS))
    logs = (exact.fma(step, Decimal(2 * k + 1), start) for k in range(ASPECTS))
    roots = (exact.exp(exact.divide(log, Decimal(2))) for log in logs)
    return np.array([int((root * ONE).to_integral_value()) for root in roots], np.int64)


@njit(nogil=True, error_model="numpy")
def mix(word):
    """splitmix64's finaliser, uint64 -> uint64."""
    word = np.uint64(word)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@njit(nogil=True, error_model="numpy")
def stream(seed, key, view):
    """The state of the stream that belongs to (seed, key, view)."""
    state = mix(np.uint64(seed) + _GOLDEN)
    state = mix(state ^ (np.uint64(key) + _GOLDEN))
    return mix(state ^ (np.uint64(view) * _KEY_SALT + _GOLDEN))


@njit(nogil=True, error_model="numpy")
def draw(state, number):
    """Word `number` of a stream: output `number` of splitmix64 seeded with `state`."""
    return mix(np.uint64(state) + (np.uint64(number) + np.uint64(1)) * _GOLDEN)


@njit(nogil=True, error_model="numpy")
def draw_below(state, number, bound):
    """An integer in [0, bound), bound <= 2**32, from the upper half of a word; the bias is below bound / 2**32."""
    return np.int64(((draw(state, number) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@njit(nogil=True, error_model="numpy")
def centre_box(height, width, fraction):
    """(top, left, height, width) of the centre square whose side is `fraction` / ONE of the shorter side."""
    side = max(np.int64(1), (min(height, width) * fraction + ONE // 2) // ONE)
    return (height - side) // 2, (width - side) // 2, side, side


@njit(nogil=True, error_model="numpy")
def crop_box(state, height, width, p):
    """(top, left, height, width) of a random resized crop: area and log aspect uniform, ten tries, then the centre
    crop nearest to the allowed aspects (torchvision.transforms.RandomResizedCrop)."""
    for attempt in range(CROP_TRIES):
        scale = p.scale_low + draw_below(state, 4 * attempt, p.scale_high - p.scale_low + 1)
        side = np.sqrt(np.float64(height * width) * np.float64(scale) / ONE)
        aspect = np.float64(p.sqrt_aspect[draw_below(state, 4 * attempt + 1, ASPECTS)]) / ONE
        crop_width, crop_height = np.int64(np.floor(side * aspect + 0.5)), np.int64(np.floor(side / aspect + 0.5))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = draw_below(state, 4 * attempt + 2, height - crop_height + 1)
            return top, draw_below(state, 4 * attempt + 3, width - crop_width + 1), crop_height, crop_width
    crop_height, crop_width = height, width
    if width * ONE < height * p.ratio_low:
        crop_height = max(np.int64(1), (width * ONE + p.ratio_low // 2) // p.ratio_low)
    elif width * ONE > height * p.ratio_high:
        crop_width = max(np.int64(1), (height * p.ratio_high + ONE // 2) // ONE)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@njit(nogil=True, error_model="numpy")
def view_geometry(p, key, view, height, width):
    """(top, left, height, width, flip) of a view of an image of `height` x `width` pixels."""
    if view == CENTRE:
        return (*centre_box(height, width, p.centre), False)
    state = stream(p.seed, key, view)
    box = crop_box(state, height, width, p) if p.random_crop else centre_box(height, width, ONE)
    return (*box, draw_below(state, FLIP_WORD, ONE) < p.flip)


@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def render(rows, views, keys, crcs, offsets, lengths, heights, widths, file, p, parts, pixels, status):
    """Render view views[i] of row rows[i] into pixels[i] (uint8 [S, S, 3], RGB); status[i] is 0 when that worked.

    Resizing is OpenCV's area interpolation, through FFCV. `file` is the mapped .beton, the columns are a Beton's. The
    rows are dealt to `parts` parts that run in parallel, each with a buffer of its own whichever thread runs it.
    """
    largest = 0
    for i in range(len(rows)):
        largest = max(largest, heights[rows[i]] * widths[rows[i]])
    decoded = np.empty((parts, 3 * largest), np.uint8)
    size = pixels.shape[1]
    for part in prange(parts):
        image = decoded[part]
        for i in range(part, len(rows), parts):
            row = rows[i]
            height, width = heights[row], widths[row]
            jpeg = file[offsets[row] : offsets[row] + lengths[row]]
            if _crc32(np.uint64(0), jpeg.ctypes.data, np.uint32(jpeg.size)) != crcs[row]:
                status[i] = CHANGED  # the decoder itself lets many flipped bits pass
                continue
            status[i] = _imdecode(
                jpeg.ctypes.data, np.uint64(jpeg.size), np.uint32(height), np.uint32(width), image.ctypes.data,
                np.uint32(height), np.uint32(width), np.uint32(0), np.uint32(0), np.uint32(1), np.uint32(1),
                False, False,
            )  # fmt: skip
            top, left, box_height, box_width, flip = view_geometry(p, keys[row], views[i], height, width)
            out = pixels[i]
            _resize(
                0, image.ctypes.data, height, width, top, top + box_height, left, left + box_width,
                out.ctypes.data, size, size,
            )  # fmt: skip
            if flip:
                out[:, :] = out[:, ::-1].copy()


@njit(cache=True, nogil=True, error_model="numpy")
def stream_states(seed, keys, number):
    """stream(seed, key, number) for each key: uint64 [N] -> uint64 [N]."""
    states = np.empty(len(keys), np.uint64)
    for i in range(len(keys)):
        states[i] = stream(seed, keys[i], number)
    return states
