"""The one decoder: checks, decodes, crops, resizes, flips, augments, erases and mixes, in code kept on disk.

Registered with FFCV by the loader. `pipeline.jpeg` gives it the C functions that it calls.
"""

import hashlib
from pathlib import Path

import numpy as np
from numba import njit, prange, types

import pipeline.jpeg  # noqa: F401  # registers the C functions before anything is compiled
from pipeline.views import colour, mixing, policies, spatial
from pipeline.views.draws import ONE, stream
from pipeline.views.geometry import CENTRE, view_geometry
from pipeline.views.parameters import MEAN_COLOUR
from pipeline.views.resize import resize

SHARE_BITS = 20 - colour.WEIGHT_BITS  # shares have as many bits as ONE, blend wants fewer
SPARES = 3  # images that the work on one view needs beside it

_decode = types.ExternalFunction(
    "softshard_decode",
    types.int32(
        types.intp, types.int64, types.int64, types.int64, types.intp, types.int64, types.intp, types.intp
    ),
)  # fmt: skip
_crc32 = types.ExternalFunction("softshard_crc32", types.uint32(types.intp, types.int64))

step = njit(nogil=True, error_model="numpy")


@step
def operate(operation, argument, image, spare):
    """Apply one operation of a plan to an image in place; `spare` is two images of scratch."""
    if operation == policies.AUTO_CONTRAST:
        colour.auto_contrast(image)
    elif operation == policies.EQUALIZE:
        colour.equalize(image)
    elif operation == policies.INVERT:
        colour.invert(image)
    elif operation == policies.POSTERIZE:
        colour.posterize(image, argument)
    elif operation == policies.SOLARIZE:
        colour.solarize(image, argument)
    elif operation == policies.SOLARIZE_ADD:
        colour.solarize_add(image, argument)
    elif operation == policies.SATURATION:
        colour.saturation(image, argument)
    elif operation == policies.CONTRAST:
        colour.contrast(image, argument)
    elif operation == policies.BRIGHTNESS:
        colour.brightness(image, argument)
    elif operation == policies.GREY:
        colour.grey(image)
    elif operation == policies.HUE:
        colour.hue(image, argument)
    else:
        _move(operation, argument, image, spare)


@step
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
        spatial.affine(image, spare[0], a, b, c, d, e, f, MEAN_COLOUR)
    image[:] = spare[0]


@step
def _augment(p, state, image, spare):
    plan = np.empty((policies.PLAN_LENGTH, 2), np.int64)
    for k in range(policies.plan_operations(p, state, plan)):
        operate(plan[k, 0], plan[k, 1], image, spare)
    for number in range(mixing.erasures(p, state)):
        top, left, height, width = mixing.erase_box(p, state, number, image.shape[0])
        if p.erase_noise:
            colour.noise(image, top, left, height, width, mixing.erase_noise_state(state, number), p.noise)
        else:
            colour.fill(image, top, left, height, width, MEAN_COLOUR)


@step
def _mix(p, state, image, other):
    """Mix another image's view in; returns the share of the image itself."""
    kind = mixing.mix_kind(p, state)
    share = mixing.mix_share(p, state, kind)
    if kind == mixing.MIXUP:
        colour.blend(image, other, share >> SHARE_BITS)
        return share
    size = image.shape[0]
    top, left, height, width = mixing.cut_box(state, share, size)
    colour.paste(image, other, top, left, height, width)
    return ONE - height * width * ONE // (size * size)


@step
def denominator(p, height, width, size):
    """How much smaller a crop of height x width is decoded for an output of size x size: 1, or, with DCT scaling, the
    largest of 2, 4 and 8 that leaves at least as many pixels as the output has."""
    scale = 1
    while p.dct_scaling and scale < 8 and min(height, width) >= 2 * scale * size:
        scale *= 2
    return scale


@step
def _views(jpeg, length, crc, height, width, key, views, p, scratch, turned, spare, out):
    """Views of one image, without mixing: uint8 [G, S, S, 3]. False when its bytes are not what was packed, or do not
    decode. Each scale of decoding that is wanted is decoded once, around all the crops that want it."""
    if _crc32(jpeg, length) != crc:
        return False
    count, size = len(views), out.shape[1]
    boxes, scales, flips = np.empty((count, 4), np.int64), np.empty(count, np.int64), np.empty(count, np.bool_)
    for g in range(count):
        top, left, box_height, box_width, flips[g] = view_geometry(p, key, views[g], height, width)
        scale = denominator(p, box_height, box_width, size)
        bottom, right = -(-(top + box_height) // scale), -(-(left + box_width) // scale)
        boxes[g] = (top // scale, left // scale, bottom, right)
        scales[g] = scale
    union, place = np.empty(4, np.int64), np.empty(4, np.int64)
    for scale in (1, 2, 4, 8):
        union[:] = (height, width, 0, 0)
        for g in range(count):
            if scales[g] == scale:
                union[:2] = np.minimum(union[:2], boxes[g, :2])
                union[2:] = np.maximum(union[2:], boxes[g, 2:])
        if union[2] == 0:
            continue
        union[2:] -= union[:2]
        if _decode(
            jpeg, length, height, width, union.ctypes.data, scale, scratch.ctypes.data, place.ctypes.data
        ):  # fmt: skip
            return False
        image = scratch[: place[2] * place[3] * 3].reshape(place[2], place[3], 3)
        for g in range(count):
            if scales[g] == scale:
                top, left, bottom, right = boxes[g]
                resize(image, top - place[0], left - place[1], bottom - top, right - left, flips[g], turned, out[g])
    for g in range(count):
        if views[g] != CENTRE:
            _augment(p, stream(p.seed, key, views[g]), out[g], spare)
    return True


def _sources() -> str:
    """A digest of all that is compiled into what follows, since numba itself looks only at this file."""
    state = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()


def _compiled(sources: str):
    @njit(cache=True, parallel=True, nogil=True, error_model="numpy")
    def render(rows, views, partners, columns, memory, slots, page_bits, p, parts, pixels, shares, failed):
        """Render views[i, g] of row rows[i] into pixels[i, g], uint8 [S, S, 3].

        rows int64 [B], views int64 [B, G]; partners int64 [B, G] has the row that a view is mixed with, or -1;
        columns: keys, crc32, offsets, lengths, heights and widths of a Beton. memory is the address of the mapped
        file, or of the cached pages, where page n lies at place slots[n] (page_bits 0: no pages). The rows are dealt
        to `parts` parts that run in parallel, each with scratch of its own whichever thread runs it. Receives:
        shares int64 [B, G], the share of the image itself in units of 1 / ONE; failed int64 [B], the row that has
        changed or does not decode, or -1.
        """
        _ = sources  # part of the key under which numba keeps a function
        keys, crcs, offsets, lengths, heights, widths = columns
        size = pixels.shape[2]
        pixel_count, widest = 0, 0
        for i in range(len(rows)):
            for g in range(-1, views.shape[1]):
                row = rows[i] if g < 0 else partners[i, g]
                if row >= 0:
                    pixel_count = max(pixel_count, heights[row] * widths[row])
                    widest = max(widest, widths[row])
        decoded = np.empty((parts, 3 * pixel_count), np.uint8)
        turned = np.empty((parts, 3 * widest * size), np.uint8)
        spares = np.empty((parts, SPARES, size, size, 3), np.uint8)
        for part in prange(parts):
            for i in range(part, len(rows), parts):
                failed[i] = -1
                for g in range(-1, views.shape[1]):
                    row = rows[i] if g < 0 else partners[i, g]
                    if row < 0:
                        continue
                    address = offsets[row]
                    if page_bits:
                        page = np.int64(slots[address >> page_bits])
                        address = (page << page_bits) + (address & ((1 << page_bits) - 1))
                    wanted = views[i] if g < 0 else views[i, g : g + 1]
                    out = pixels[i] if g < 0 else spares[part, 2:3]
                    whole = _views(
                        memory + address, lengths[row], crcs[row], heights[row], widths[row], keys[row], wanted, p,
                        decoded[part], turned[part], spares[part], out,
                    )  # fmt: skip
                    if not whole:
                        failed[i] = row
                        break
                    if g < 0:
                        shares[i] = ONE
                    else:
                        state = stream(p.seed, keys[rows[i]], views[i, g])
                        shares[i, g] = _mix(p, state, pixels[i, g], spares[part, 2])

    @njit(cache=True, nogil=True, error_model="numpy")
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


render, find_partners = _compiled(_sources())
