"""Cropping and resizing against Pillow, bit for bit: photographs, noise and extremes, from one pixel to thousands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from softshard.pipeline.views.kernels.resize import _filter, resize

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
CANARY = 77
BILINEAR = Image.Resampling.BILINEAR


def pillow(image: Pixels, box: Box, size: int, flip: bool) -> Pixels:
    top, left, height, width = box
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    resized = np.array(crop.resize((width, size), BILINEAR).resize((size, size), BILINEAR))
    return resized[:, ::-1] if flip else resized


def resized(image: Pixels, box: Box, size: int, flip: bool = False) -> Pixels:
    """With no more scratch than promised, and canaries after it and after the output."""
    scratch = np.full(size * box[3] * 3 + 1000, CANARY, np.uint8)
    out = np.full(size * size * 3 + 1000, CANARY, np.uint8)
    given = image.copy()
    resize(given, *box, flip, scratch, out[: size * size * 3].reshape(size, size, 3))
    np.testing.assert_array_equal(given, image)
    assert (scratch[size * box[3] * 3 :] == CANARY).all()
    assert (out[size * size * 3 :] == CANARY).all()
    return out[: size * size * 3].reshape(size, size, 3)


def whole(image: Pixels) -> Box:
    return (0, 0, image.shape[0], image.shape[1])


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


SHAPES = [
    (1, 1), (1, 2), (2, 1), (1, 999), (999, 1), (2, 3), (3, 2), (7, 31), (64, 64), (63, 65), (97, 1500), (1500, 97),
    (2, 4000), (4000, 2), (333, 500),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 32, 63, 64, 65, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_equals_pillow(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    for extreme in (
        image,
        np.where(image > 127, np.uint8(255), np.uint8(0)),
        np.full_like(image, 255),
        np.zeros_like(image),
    ):
        for flip in (False, True):
            np.testing.assert_array_equal(
                resized(extreme, whole(image), size, flip), pillow(extreme, whole(image), size, flip)
            )


@pytest.mark.parametrize("size", [32, 160, 224, 384, 700])
def test_photographs_equal_pillow(size: int, photographs: list[Image.Image]) -> None:
    for photograph, flip in zip(photographs, (False, True), strict=True):
        image = np.array(photograph)
        for box in (whole(image), (100, 200, 160, 224), (17, 33, 350, 41), (0, 0, 1, 640), (426, 639, 1, 1)):
            np.testing.assert_array_equal(resized(image, box, size, flip), pillow(image, box, size, flip))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    rows, columns = draw(st.integers(1, height)), draw(st.integers(1, width))
    return (height, width), (draw(st.integers(0, height - rows)), draw(st.integers(0, width - columns)), rows, columns)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(boxes(), st.integers(1, 120), st.booleans(), st.integers(0, 99))
def test_any_box_equals_pillow(case: tuple[tuple[int, int], Box], size: int, flip: bool, seed: int) -> None:
    (height, width), box = case
    image = noise(height, width, seed)
    np.testing.assert_array_equal(resized(image, box, size, flip), pillow(image, box, size, flip))


def test_every_length_to_every_size_equals_pillow() -> None:
    """The filter's weights, for all scales up to 70 to 70 in both directions: wherever a double could round."""
    image = noise(70, 70)
    for length in range(1, 71):
        for size in range(1, 71):
            box = (70 - length, 3 % (71 - length), length, length)
            np.testing.assert_array_equal(resized(image, box, size), pillow(image, box, size, False))


@pytest.mark.parametrize("shape", [(65535, 1), (1, 65535), (9973, 11), (11, 9973)])
def test_the_longest_images_equal_pillow(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for extreme in (image, np.full_like(image, 255)):
        for size in (1, 7, 224):
            np.testing.assert_array_equal(
                resized(extreme, whole(image), size), pillow(extreme, whole(image), size, False)
            )


def test_the_same_size_changes_nothing() -> None:
    image = noise(90, 90)
    np.testing.assert_array_equal(resized(image, whole(image), 90), image)
    np.testing.assert_array_equal(resized(image, whole(image), 90, flip=True), image[:, ::-1])
    np.testing.assert_array_equal(resized(image, (5, 8, 40, 40), 40), image[5:45, 8:48])


def test_what_is_outside_of_the_box_does_not_matter() -> None:
    image, box = noise(80, 90), (20, 30, 33, 44)
    other = ~image
    other[20:53, 30:74] = image[20:53, 30:74]
    np.testing.assert_array_equal(resized(image, box, 64), resized(other, box, 64))


def test_compiled_weights_equal_uncompiled_ones() -> None:
    """Python's own doubles: nothing is contracted, reordered or divided by multiplying."""
    rng = np.random.default_rng(1)
    cases = [(1, 1), (1, 300), (65535, 1), *rng.integers(1, 2000, (40, 2)), *rng.integers(1, 120, (200, 2))]
    for length, size in cases:
        compiled, uncompiled = (f(np.int64(length), np.int64(size)) for f in (_filter, _filter.py_func))
        for first, second in zip(compiled[:2], uncompiled[:2], strict=True):
            np.testing.assert_array_equal(first, second)
        for row, count in enumerate(compiled[1]):
            np.testing.assert_array_equal(compiled[2][row, :count], uncompiled[2][row, :count])
