"""The one decoder: checks, decodes, crops, resizes, flips, augments, erases and mixes, in code kept on disk.

Registered with FFCV by the loader. `softshard.pipeline.images.jpeg` gives it the C functions that it calls.
"""

import numpy as np
from numba import types

import softshard.pipeline.images.jpeg  # noqa: F401  # registers the C functions before anything is compiled
from softshard.pipeline.views import mixing, policies
from softshard.pipeline.views.geometry import CENTER, view_geometry
from softshard.pipeline.views.kernels import color, spatial
from softshard.pipeline.views.kernels.jit import compiled, kept, sources_digest
from softshard.pipeline.views.kernels.resize import resize
from softshard.pipeline.views.kernels.rng import ONE, stream
from softshard.pipeline.views.parameters import MEAN_COLOR

LAM_BITS = 20 - color.WEIGHT_BITS  # lams have as many bits as ONE, blend wants fewer
SCRATCH_IMAGES = 3  # images that the work on one view needs beside it

_decode = types.ExternalFunction(
    "softshard_decode",
    types.int32(
        types.intp, types.int64, types.int64, types.int64, types.intp, types.int64, types.intp, types.intp
    ),
)  # fmt: skip
_crc32 = types.ExternalFunction("softshard_crc32", types.uint32(types.intp, types.int64))


@compiled
def operate(operation, argument, image, spare):
    """Apply one operation of a plan to an image in place; `spare` is two images of scratch."""
    if operation == policies.AUTO_CONTRAST:
        color.auto_contrast(image)
    elif operation == policies.EQUALIZE:
        color.equalize(image)
    elif operation == policies.INVERT:
        color.invert(image)
    elif operation == policies.POSTERIZE:
        color.posterize(image, argument)
    elif operation == policies.SOLARIZE:
        color.solarize(image, argument)
    elif operation == policies.SOLARIZE_ADD:
        color.solarize_add(image, argument)
    elif operation == policies.SATURATION:
        color.saturation(image, argument)
    elif operation == policies.CONTRAST:
        color.contrast(image, argument)
    elif operation == policies.BRIGHTNESS:
        color.brightness(image, argument)
    elif operation == policies.GRAY:
        color.gray(image)
    elif operation == policies.HUE:
        color.hue(image, argument)
    else:
        _move(operation, argument, image, spare)


@compiled
def _move(operation, argument, image, spare):
    size = image.shape[0]
    if operation == policies.SHARPNESS:
        spatial.sharpness(image, spare[0], argument)
    elif operation == policies.BLUR:
        spatial.gaussian_blur(image, spare[0], spare[1], argument * size // policies.BLUR_UNIT)
    else:
        a = e = np.int64(ONE)
        b = c = d = f = np.int64(0)
        if operation == policies.ROTATE:
            a, b, c, d, e, f = spatial.rotation(argument, size, size)
        elif operation == policies.SHEAR_X:
            b = argument
        elif operation == policies.SHEAR_Y:
            d = argument
        elif operation == policies.TRANSLATE_X:
            c = argument * size
        else:
            f = argument * size
        spatial.affine(image, spare[0], a, b, c, d, e, f, MEAN_COLOR)
    image[:] = spare[0]


@compiled
def _augment(p, state, image, spare):
    plan = np.empty((policies.PLAN_LENGTH, 2), np.int64)
    for k in range(policies.plan_operations(p, state, plan)):
        operate(plan[k, 0], plan[k, 1], image, spare)
    for number in range(mixing.erasures(p, state)):
        top, left, height, width = mixing.erase_box(p, state, number, image.shape[0])
        if p.erase_noise:
            color.noise(image, top, left, height, width, mixing.erase_noise_state(state, number), p.noise)
        else:
            color.fill(image, top, left, height, width, MEAN_COLOR)


@compiled
def _mix(p, state, image, other):
    """Mix another image's view in; returns the lam of the image itself."""
    kind = mixing.mix_kind(p, state)
    lam = mixing.mix_lam(p, state, kind)
    if kind == mixing.MIXUP:
        color.blend(image, other, lam >> LAM_BITS)
        return lam
    size = image.shape[0]
    top, left, height, width = mixing.cut_box(state, lam, size)
    color.paste(image, other, top, left, height, width)
    return ONE - height * width * ONE // (size * size)


@compiled
def denominator(p, height, width, size):
    """How much smaller a crop of height x width is decoded for an output of size x size: 1, or, with DCT scaling, the
    largest of 2, 4 and 8 that leaves at least as many pixels as the output has."""
    scale = 1
    while p.dct_scaling and scale < 8 and min(height, width) >= 2 * scale * size:
        scale *= 2
    return scale


@compiled
def _views(jpeg, length, crc, height, width, key, views, p, scratch, turned, spare, out):
    """Views of one image, without mixing: uint8 [G, S, S, 3]. False when its bytes are not what was packed, or do not
    decode. Each scale of decoding that is wanted is decoded once, around all the crops that want it."""
    if _crc32(jpeg, length) != crc:
        return False
    count, size = len(views), out.shape[1]
    boxes, flips = np.empty((count, 5), np.int64), np.empty(count, np.bool_)
    for g in range(count):
        top, left, box_height, box_width, flips[g] = view_geometry(p, key, views[g], height, width)
        scale = denominator(p, box_height, box_width, size)
        boxes[g, 0], boxes[g, 1] = top // scale, left // scale
        boxes[g, 2], boxes[g, 3] = -(-(top + box_height) // scale), -(-(left + box_width) // scale)
        boxes[g, 4] = scale
    wanted, place = np.empty(4, np.int64), np.empty(4, np.int64)
    for scale in (1, 2, 4, 8):
        top, left, bottom, right = height, width, np.int64(0), np.int64(0)
        for g in range(count):
            if boxes[g, 4] == scale:
                top, left = min(top, boxes[g, 0]), min(left, boxes[g, 1])
                bottom, right = max(bottom, boxes[g, 2]), max(right, boxes[g, 3])
        if bottom == 0:
            continue
        wanted[0], wanted[1], wanted[2], wanted[3] = top, left, bottom - top, right - left
        if _decode(jpeg, length, height, width, wanted.ctypes.data, scale, scratch.ctypes.data, place.ctypes.data):
            return False
        image = scratch[: place[2] * place[3] * 3].reshape(place[2], place[3], 3)
        for g in range(count):
            if boxes[g, 4] == scale:
                top, left, bottom, right = boxes[g, 0], boxes[g, 1], boxes[g, 2], boxes[g, 3]
                resize(image, top - place[0], left - place[1], bottom - top, right - left, flips[g], turned, out[g])
    for g in range(count):
        if views[g] != CENTER:
            _augment(p, stream(p.seed, key, views[g]), out[g], spare)
    return True


def _keyed(sources: str):
    @kept
    def render(part, parts, rows, views, partners, columns, memory, slots, page_bits, p, pixels, lams, failed):
        """Render views[i, g] of row rows[i] into pixels[i, g], uint8 [S, S, 3], for i = part, part + parts, ...

        rows int64 [B], views int64 [B, G]; partners int64 [B, G] has the row that a view is mixed with, or -1;
        columns: keys, crc32, offsets, lengths, heights and widths of a Beton. memory is the address of the mapped
        file, or of the cached pages, where page n lies at place slots[n] (page_bits 0: no pages). Receives: lams
        int64 [B, G], the lam of the image itself in units of 1 / ONE; failed int64 [B], the row that has changed
        or does not decode, or -1.
        """
        _ = sources  # part of the key under which numba keeps a function
        keys, crcs, offsets, lengths, heights, widths = columns
        count, size = views.shape[1], pixels.shape[2]
        largest, widest = np.int64(0), np.int64(0)
        for i in range(part, len(rows), parts):
            for g in range(-1, count):
                row = rows[i] if g < 0 else partners[i, g]
                if row >= 0:
                    largest, widest = max(largest, heights[row] * widths[row]), max(widest, widths[row])
        decoded, turned = np.empty(3 * largest, np.uint8), np.empty(3 * widest * size, np.uint8)
        spare = np.empty((SCRATCH_IMAGES, size, size, 3), np.uint8)
        for i in range(part, len(rows), parts):
            failed[i] = -1
            for g in range(-1, count):  # the image's own views, then the partner of each
                row = rows[i] if g < 0 else partners[i, g]
                if row < 0:
                    lams[i, g] = ONE
                    continue
                address = offsets[row]
                if page_bits:
                    page = np.int64(slots[address >> page_bits])
                    address = (page << page_bits) + (address & ((1 << page_bits) - 1))
                whole = _views(
                    memory + address, lengths[row], crcs[row], heights[row], widths[row], keys[row],
                    views[i] if g < 0 else views[i, g : g + 1], p, decoded, turned, spare,
                    pixels[i] if g < 0 else spare[2:],
                )  # fmt: skip
                if not whole:
                    failed[i] = row
                    break
                if g >= 0:
                    lams[i, g] = _mix(p, stream(p.seed, keys[rows[i]], views[i, g]), pixels[i, g], spare[2])

    @kept
    def find_partners(p, keys, order, views):
        """The rows that views are mixed with, or -1: keys uint64 [B], order int64 [N] (rows sorted by key digest),
        views int64 [B, G] -> int64 [B, G]."""
        _ = sources
        rows = np.empty(views.shape, np.int64)
        for i in range(views.shape[0]):
            for g in range(views.shape[1]):
                place = mixing.partner(p, keys[i], views[i, g], len(order))
                rows[i, g] = -1 if place < 0 else order[place]
        return rows

    return render, find_partners


render, find_partners = _keyed(sources_digest())
