"""The spatial kernels against Pillow, bit for bit given the same numbers, on photographs, noise and extremes."""

import numpy as np
import pytest
from mpmath import mp
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from softshard.pipeline.views.kernels import color, spatial

Pixels = NDArray[np.uint8]
UNIT = 1 << spatial.COEFFICIENT_BITS
FILL = (128, 7, 255)
IDENTITY = (UNIT, 0, 0, 0, UNIT, 0)


@pytest.fixture(scope="module")
def images(photographs: list[Image.Image]) -> list[Pixels]:
    """Photographs in several sizes, noise, and images of constant or extreme values."""
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (160, 97), (8, 8), (3, 3), (1, 1)]
    result = [np.array(photograph.resize(size)) for photograph in photographs for size in sizes]
    result += [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((64, 64), (97, 33), (2, 7))]
    result += [255 * rng.integers(0, 2, (40, 50, 3), np.uint8), np.full((16, 24, 3), 255, np.uint8)]
    return result


def moved(kernel, image: Pixels, *arguments) -> Pixels:
    source, target = image.copy(), np.full_like(image, 77)
    kernel(source, target, *arguments)
    np.testing.assert_array_equal(source, image)
    return target


def pillow_affine(image: Pixels, coefficients: tuple) -> Pixels:
    original = Image.fromarray(image)
    data = tuple(coefficient / UNIT for coefficient in coefficients)
    return np.array(
        original.transform(original.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL)
    )


def test_any_affine_map_equals_pillow(images: list[Pixels]) -> None:
    rng = np.random.default_rng(1)
    for image in images:
        for _ in range(12):
            a, b, d, e = (int(value) for value in rng.integers(-2 * UNIT, 2 * UNIT, 4))
            c, f = (int(rng.integers(-side * UNIT, side * UNIT)) for side in (image.shape[1], image.shape[0]))
            result = moved(spatial.affine, image, a, b, c, d, e, f, FILL)
            np.testing.assert_array_equal(result, pillow_affine(image, (a, b, c, d, e, f)))


@pytest.mark.parametrize("angle", [-11520, -1920, -1, 0, 1, 64 * 17, 1920, 2880, 5760, 8000, 11520, 17280, 23039])
def test_rotation_coefficients_equal_pillow(angle: int, images: list[Pixels]) -> None:
    for image in images:
        coefficients = spatial.rotation(angle, *image.shape[:2])
        result = moved(spatial.affine, image, *coefficients, FILL)
        np.testing.assert_array_equal(result, pillow_affine(image, coefficients))


@pytest.mark.parametrize("fraction", [-314573, -100000, 1, 314573])
def test_shears_and_translations_equal_pillow(fraction: int, images: list[Pixels]) -> None:
    for image in images:
        height, width = image.shape[:2]
        for coefficients in (
            (UNIT, fraction, 0, 0, UNIT, 0),
            (UNIT, 0, 0, fraction, UNIT, 0),
            (UNIT, 0, fraction * width, 0, UNIT, 0),
            (UNIT, 0, 0, 0, UNIT, fraction * height),
        ):
            result = moved(spatial.affine, image, *coefficients, FILL)
            np.testing.assert_array_equal(result, pillow_affine(image, coefficients))


def test_rotation_is_near_pillows_rotate(images: list[Pixels]) -> None:
    """Image.rotate's own coefficients are doubles; ours are off by 2**-21 each, a ten thousandth of a pixel."""
    for image in images[:2]:
        for angle in range(-1920, 1921, 77):
            result = moved(spatial.affine, image, *spatial.rotation(angle, *image.shape[:2]), FILL).astype(int)
            rotated = Image.fromarray(image).rotate(angle / 64, Image.Resampling.BILINEAR, fillcolor=FILL)
            difference = abs(result - np.array(rotated))
            assert difference.mean() < 0.01
            assert difference.max() <= 1


@pytest.mark.parametrize("quarters", range(-4, 5))
def test_quarter_turns_move_pixels_exactly(quarters: int) -> None:
    image = np.random.default_rng(2).integers(0, 256, (31, 31, 3), np.uint8)
    result = moved(spatial.affine, image, *spatial.rotation(90 * 64 * quarters, 31, 31), FILL)
    np.testing.assert_array_equal(result, np.rot90(image, quarters))


def test_half_turns_of_any_size_move_pixels_exactly(images: list[Pixels]) -> None:
    for image in images:
        result = moved(spatial.affine, image, *spatial.rotation(180 * 64, *image.shape[:2]), FILL)
        np.testing.assert_array_equal(result, image[::-1, ::-1])


def test_the_identity_changes_nothing(images: list[Pixels]) -> None:
    for image in images:
        np.testing.assert_array_equal(moved(spatial.affine, image, *IDENTITY, FILL), image)
        np.testing.assert_array_equal(moved(spatial.sharpness, image, 1 << color.FACTOR_BITS), image)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 5), (2, -7), (40, 0), (0, -30)])
def test_translations_by_whole_pixels_move_pixels_exactly(right: int, down: int) -> None:
    image = np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8)
    result = moved(spatial.affine, image, UNIT, 0, -right * UNIT, 0, UNIT, -down * UNIT, FILL)
    for y in range(30):
        for x in range(40):
            inside = 0 <= y - down < 30 and 0 <= x - right < 40
            np.testing.assert_array_equal(result[y, x], image[y - down, x - right] if inside else FILL)


def test_no_sine_is_near_a_rounding_boundary() -> None:
    """Then every C library whose sine is good to a millionth of a step of 2**-20 gives the same table."""
    with mp.workdps(40):
        for k, frozen in enumerate(spatial.sine_table()):
            exact = UNIT * mp.sin(mp.pi * k / (180 * spatial.DEGREE))
            assert abs(exact - int(frozen)) < mp.mpf(1) / 2 - mp.mpf("1e-6")


def test_sines_of_any_angle() -> None:
    for angle in range(-50000, 50000, 7):
        assert abs(spatial.sine(angle) - UNIT * np.sin(np.pi * angle / 11520)) < 0.501
    assert [spatial.sine(5760 * quarter) for quarter in range(5)] == [0, UNIT, 0, -UNIT, 0]


@pytest.mark.parametrize("factor", [0, 1, 1638, 9999, 1 << 14, 31130, 1 << 15, 50001, 65535, 1 << 16])
def test_sharpness_equals_pillow(factor: int, images: list[Pixels]) -> None:
    for image in images:
        expected = ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor / (1 << color.FACTOR_BITS))
        np.testing.assert_array_equal(moved(spatial.sharpness, image, factor), np.array(expected))


def blurred(image: Pixels, radius: int) -> Pixels:
    return moved(lambda source, target: spatial.gaussian_blur(source, target, np.empty_like(image), radius), image)


@pytest.mark.parametrize("radius", [0, 1, 102, 512, 777, 1024, 1448, 1449, 1536, 2000, 2048, 2508, 2509, 5000, 50000])
def test_blur_equals_pillow(radius: int, images: list[Pixels]) -> None:
    for image in images:
        expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius / (1 << spatial.RADIUS_BITS)))
        np.testing.assert_array_equal(blurred(image, radius), np.array(expected))


def test_blur_equals_pillow_for_every_radius() -> None:
    image = np.random.default_rng(4).integers(0, 256, (12, 9, 3), np.uint8)
    for radius in range(4096):
        expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius / (1 << spatial.RADIUS_BITS)))
        np.testing.assert_array_equal(blurred(image, radius), np.array(expected))


def test_blur_keeps_constants_and_commutes_with_transposing_nearly() -> None:
    constant = np.full((20, 30, 3), 201, np.uint8)
    np.testing.assert_array_equal(blurred(constant, 1700), constant)
    image = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
    transposed = blurred(np.ascontiguousarray(image.swapaxes(0, 1)), 1700).swapaxes(0, 1)
    assert abs(transposed.astype(int) - blurred(image, 1700)).max() <= 2
