"""The color kernels against Pillow, bit for bit, on photographs, noise, constants and extremes."""

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment
from torchvision.transforms import functional

from softshard.pipeline.views.kernels import color
from softshard.pipeline.views.kernels.rng import draw

Pixels = NDArray[np.uint8]
ONE = 1 << color.FACTOR_BITS
FACTORS = [0, 1, 1638, 9999, ONE - 1, ONE, ONE + 1, 31130, 2 * ONE, 50001, 4 * ONE - 1, 4 * ONE]


@pytest.fixture(scope="module")
def images(photographs: list[Image.Image]) -> list[Pixels]:
    """Photographs in several sizes, noise, constants, and images of few or extreme values."""
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (160, 97), (8, 8), (3, 3), (1, 1)]
    result = [np.array(photograph.resize(size)) for photograph in photographs for size in sizes]
    result += [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((64, 64), (97, 33), (1, 7))]
    result += [rng.integers(100, 104, (40, 50, 3), np.uint8), 255 * rng.integers(0, 2, (40, 50, 3), np.uint8)]
    result += [np.full((16, 24, 3), value, np.uint8) for value in (0, 1, 127, 128, 254, 255)]
    return result


def every_color() -> Pixels:
    """All 2**24 colors, in one image."""
    number = np.arange(1 << 24, dtype=np.uint32).reshape(4096, 4096)
    return np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8)


def changed(kernel, image: Pixels, *arguments) -> Pixels:
    result = image.copy()
    kernel(result, *arguments)
    return result


def assert_equals_pillow(kernel, pillow, images: list[Pixels], *arguments) -> None:
    for image in images:
        np.testing.assert_array_equal(changed(kernel, image, *arguments), np.array(pillow(Image.fromarray(image))))


@pytest.mark.parametrize("name", ["invert", "auto_contrast", "equalize"])
def test_operations_without_parameters_equal_timm(name: str, images: list[Pixels]) -> None:
    assert_equals_pillow(getattr(color, name), getattr(auto_augment, name), images)


def test_auto_contrast_equals_pillow_for_all_extremes() -> None:
    for low in range(256):
        row = np.arange(256).clip(low)
        tall = np.stack([np.stack([row.clip(max=high)] * 3, axis=-1) for high in range(low, 256, 7)]).astype(np.uint8)
        for image in tall[:, None]:
            assert_equals_pillow(color.auto_contrast, ImageOps.autocontrast, [np.ascontiguousarray(image)])


@pytest.mark.parametrize("bits", range(1, 10))
def test_posterize_equals_timm(bits: int, images: list[Pixels]) -> None:
    assert_equals_pillow(color.posterize, lambda image: auto_augment.posterize(image, bits), images, bits)


def test_posterizing_to_no_bits_is_black(images: list[Pixels]) -> None:
    assert not any(changed(color.posterize, image, 0).any() for image in images)


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255, 256])
def test_solarize_equals_timm(threshold: int, images: list[Pixels]) -> None:
    assert_equals_pillow(color.solarize, lambda image: auto_augment.solarize(image, threshold), images, threshold)


@pytest.mark.parametrize("add", [0, 1, 66, 110, 128, 255])
def test_solarize_add_equals_timm(add: int, images: list[Pixels]) -> None:
    assert_equals_pillow(color.solarize_add, lambda image: auto_augment.solarize_add(image, add), images, add)


ENHANCEMENTS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ENHANCEMENTS)
def test_enhancements_equal_pillow(name: str, factor: int, images: list[Pixels]) -> None:
    enhance = ENHANCEMENTS[name]
    assert_equals_pillow(getattr(color, name), lambda image: enhance(image).enhance(factor / ONE), images, factor)


@njit
def interpolate_all(start, end, factor, result):
    for i in range(len(start)):
        result[i] = color.interpolate(start[i], end[i], factor)


def test_the_blend_is_exact_for_all_factors() -> None:
    """Against start + factor * (end - start) in float32, as C computes it."""
    start, end = (grid.ravel().astype(np.int32) for grid in np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 3)))
    result = np.empty_like(start)
    for factor in range(0, 4 * ONE + 1, 7):
        value = start.astype(np.float32) + np.float32(factor / ONE) * (end - start).astype(np.float32)
        interpolate_all(start, end, np.int32(factor), result)
        np.testing.assert_array_equal(result, np.floor(value.clip(0, 255)))


def test_gray_equals_pillow_for_every_color() -> None:
    image = every_color()
    expected = np.array(Image.fromarray(image).convert("L"))
    color.gray(image)
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], expected)


def turned(image: Image.Image, hue_factor: float) -> Image.Image:
    return functional.adjust_hue(image, hue_factor)  # pyright: ignore  (it takes Pillow images and tensors)


@pytest.mark.parametrize("hue_factor", [-0.5, -0.1, 0.0, 0.013, 0.1, 0.25, 0.5])
def test_hue_equals_torchvision(hue_factor: float, images: list[Pixels]) -> None:
    shift = int(hue_factor * 255) % 256
    assert_equals_pillow(color.hue, lambda image: turned(image, hue_factor), images, shift)


def test_hue_equals_pillow_for_every_color() -> None:
    """All colors to hue, saturation and value; all of those back."""
    image = every_color()
    expected = np.array(turned(Image.fromarray(image), 0.2))
    color.hue(image, 51)
    np.testing.assert_array_equal(image, expected)


def test_hue_shifts_wrap_around() -> None:
    steps = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    for shift in range(0, 256, 3):
        hue, saturation, value = Image.fromarray(steps).convert("HSV").split()
        shifted = Image.fromarray(np.array(hue) + np.uint8(shift))
        expected = Image.merge("HSV", (shifted, saturation, value)).convert("RGB")
        np.testing.assert_array_equal(changed(color.hue, steps, shift), np.array(expected))


def test_neutral_parameters_change_nothing(images: list[Pixels]) -> None:
    neutral = {
        "posterize": 8,
        "solarize": 256,
        "solarize_add": 0,
        "brightness": ONE,
        "contrast": ONE,
        "saturation": ONE,
    }
    for name, parameter in neutral.items():
        for image in images:
            np.testing.assert_array_equal(changed(getattr(color, name), image, parameter), image)


def test_inverting_twice_and_posterizing_twice(images: list[Pixels]) -> None:
    for image in images:
        once = changed(color.posterize, image, 3)
        np.testing.assert_array_equal(changed(color.posterize, once, 3), once)
        np.testing.assert_array_equal(changed(color.invert, changed(color.invert, image)), image)


BOXES = [(0, 0, 64, 48), (5, 7, 20, 30), (63, 47, 1, 1), (10, 10, 0, 5), (3, 0, 2, 48)]


@pytest.mark.parametrize("box", BOXES)
def test_fill_and_paste_touch_only_their_box(box: tuple[int, int, int, int]) -> None:
    image, other = np.random.default_rng(3).integers(0, 256, (2, 64, 48, 3), np.uint8)
    top, left, height, width = box
    filled, pasted = image.copy(), image.copy()
    filled[top : top + height, left : left + width] = (1, 128, 255)
    pasted[top : top + height, left : left + width] = other[top : top + height, left : left + width]
    np.testing.assert_array_equal(changed(color.fill, image, *box, (1, 128, 255)), filled)
    np.testing.assert_array_equal(changed(color.paste, image, other, *box), pasted)


@pytest.mark.parametrize("box", BOXES)
def test_noise_is_its_definition(box: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(4)
    image, table = rng.integers(0, 256, (64, 48, 3), np.uint8), rng.integers(0, 256, (3, 1024), np.uint8)
    top, left, height, width = box
    expected = image.copy()
    for y in range(height):
        for x in range(width):
            word = int(draw(np.uint64(99), y * width + x))
            expected[top + y, left + x] = [table[channel, word >> 10 * channel & 1023] for channel in range(3)]
    np.testing.assert_array_equal(changed(color.noise, image, *box, np.uint64(99), table), expected)


def test_noise_has_the_tables_frequencies() -> None:
    """Chi-square of the values drawn, mean 255 and deviation 23 under uniformity; channels are uncorrelated."""
    table = np.tile(np.arange(1024) // 4, (3, 1)).astype(np.uint8)
    image = np.zeros((512, 512, 3), np.uint8)
    color.noise(image, 0, 0, 512, 512, np.uint64(7), table)
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 5 * 23
    correlations = np.corrcoef(image.reshape(-1, 3).T.astype(float))
    assert abs(correlations - np.eye(3)).max() < 0.01


@pytest.mark.parametrize("weight", [0, 1, 12345, 1 << 15, 54321, (1 << 16) - 1, 1 << 16])
def test_blend_rounds_the_weighted_mean(weight: int, images: list[Pixels]) -> None:
    for image in images:
        other = image[::-1, ::-1].copy()
        mean = (weight * image.astype(np.int64) + ((1 << 16) - weight) * other.astype(np.int64) + (1 << 15)) >> 16
        np.testing.assert_array_equal(changed(color.blend, image, other, weight), mean)


def test_whole_weights_choose_an_image() -> None:
    image, other = np.random.default_rng(5).integers(0, 256, (2, 30, 20, 3), np.uint8)
    np.testing.assert_array_equal(changed(color.blend, image, other, 1 << 16), image)
    np.testing.assert_array_equal(changed(color.blend, image, other, 0), other)
