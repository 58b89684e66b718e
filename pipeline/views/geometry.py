"""Where a view lies in its image: the crop and the flip.

Word numbers: 4t .. 4t+3 for try t of the crop (area, aspect, top, left), 64 for the flip.
"""

import numpy as np

from softshard.pipeline.views.kernels.jit import compiled
from softshard.pipeline.views.kernels.rng import ASPECTS, ONE, draw_below, stream

CENTER = -1  # the view number of the center crop that validation uses: no draws
CROP_TRIES = 10
FLIP_WORD = 64


@compiled
def center_box(height, width, fraction):
    """(top, left, height, width) of the center square whose side is `fraction` / ONE of the shorter side."""
    side = max(np.int64(1), (min(height, width) * fraction + ONE // 2) // ONE)
    return (height - side) // 2, (width - side) // 2, side, side


@compiled
def crop_box(state, height, width, p):
    """(top, left, height, width) of a random resized crop: area and log aspect uniform, ten tries, then the center
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


@compiled
def view_geometry(p, key, view, height, width):
    """(top, left, height, width, flip) of a view of an image of `height` x `width` pixels."""
    if view == CENTER:
        return (*center_box(height, width, p.center), False)
    state = stream(p.seed, key, view)
    box = crop_box(state, height, width, p) if p.random_crop else center_box(height, width, ONE)
    return (*box, draw_below(state, FLIP_WORD, ONE) < p.flip)
