"""The JPEG decoder against Pillow's, whole, cropped and scaled; and against files that are not what they claim."""

import io
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from numpy.typing import NDArray
from PIL import Image

from softshard.pipeline.images.jpeg import _library, decode, decodes

Pixels = NDArray[np.uint8]
CANARY = 77
# Chroma layouts: what Pillow writes, and, with as many blocks in a unit, the sampling factors that its header then gets
LAYOUTS = {
    "4:4:4": (0, None),
    "4:2:2": (1, None),
    "4:2:0": (2, None),
    "4:4:0": (1, 0x12),
    "4:1:1": (2, 0x41),
    "quarter height": (2, 0x14),
}
UNITS = {0: (8, 8), 1: (8, 16), 2: (16, 16), 0x12: (16, 8), 0x41: (8, 32), 0x14: (32, 8)}  # rows and columns of a unit


def encode(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def frame(data: bytes) -> int:
    """Where the marker of the frame header is."""
    at = 2
    while data[at + 1] not in (0xC0, 0xC1, 0xC2):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def edit(data: bytes, at: int, *values: int) -> bytes:
    return data[:at] + bytes(values) + data[at + len(values) :]


def with_size(data: bytes, height: int, width: int) -> bytes:
    return edit(data, frame(data) + 5, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"))


def laid_out(image: Image.Image, layout: str, whole_units: bool = False, **options) -> tuple[bytes, int, int]:
    """A JPEG of about the image's size with its height and width. Where Pillow cannot write a layout, the image is cut
    into as many units of another one: the picture is scrambled, the file is sound."""
    subsampling, factors = LAYOUTS[layout]
    if factors is None:
        return encode(image, subsampling=subsampling, **options), image.height, image.width
    unit_height, unit_width = UNITS[factors]
    source_height, source_width = UNITS[subsampling]
    down, across = -(-image.height // unit_height), -(-image.width // unit_width)
    height, width = (down * unit_height, across * unit_width) if whole_units else (image.height, image.width)
    data = encode(image.resize((across * source_width, down * source_height)), subsampling=subsampling, **options)
    data = with_size(data, height, width)
    return edit(data, frame(data) + 11, factors), height, width


def pillow(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_box(
    data: bytes, height: int, width: int, box: tuple[int, int, int, int], denominator: int = 1
) -> tuple[Pixels, tuple[int, int, int, int]] | None:
    """The box, cut out of what the C function gives, and the place of that; None when it fails. Nothing is written
    beyond the scaled image."""
    room = -(-height // denominator) * -(-width // denominator) * 3
    out, place = np.full(room + 4096, CANARY, np.uint8), np.full(5, -CANARY, np.int64)
    status = _library.softshard_decode(
        data, len(data), height, width, np.array(box, np.int64).ctypes.data, denominator, out.ctypes.data,
        place.ctypes.data,
    )  # fmt: skip
    assert (out[room:] == CANARY).all()
    assert place[4] == -CANARY
    if status:
        return None
    top, left, rows, columns = (int(value) for value in place[:4])
    image = out[: rows * columns * 3].reshape(rows, columns, 3)
    part = image[box[0] - top : box[0] - top + box[2], box[1] - left : box[1] - left + box[3]]
    return part, (top, left, rows, columns)


def random_boxes(rng: np.random.Generator, height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    """Half of them of any size, half of at most 9 pixels a side."""
    boxes = []
    for number in range(count):
        limit = 9 if number % 2 else max(height, width)
        rows, columns = (int(rng.integers(1, min(side, limit) + 1)) for side in (height, width))
        boxes.append((int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns))
    return boxes


def noisy(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("restarts", [0, 1, 5])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decode_equals_pillow(layout: str, progressive: bool, restarts: int, photographs: list[Image.Image]) -> None:
    options = {"progressive": progressive, "restart_marker_blocks": restarts}
    for image in (photographs[0], photographs[1].crop((100, 40, 331, 399)), noisy(np.random.default_rng(0), 64, 96)):
        data, height, width = laid_out(image, layout, whole_units=progressive, quality=85, **options)
        expected = pillow(data)
        assert expected.shape == (height, width, 3)
        np.testing.assert_array_equal(decode(data, height, width), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_and_odd_sizes_decode_as_with_pillow(layout: str, photographs: list[Image.Image]) -> None:
    for side in range(1, 51):
        for height, width in ((side, side), (side, 51 - side), (1, side), (side, 1)):
            data, *size = laid_out(photographs[side % 2].resize((width, height)), layout)
            np.testing.assert_array_equal(decode(data, *size), pillow(data), err_msg=f"{height} x {width}")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_gray_and_rgb_jpegs_decode_as_with_pillow(mode: str, progressive: bool, photographs: list[Image.Image]) -> None:
    for image in (photographs[0], photographs[1].resize((33, 50))):
        data = encode(image.convert(mode), progressive=progressive, keep_rgb=True)
        np.testing.assert_array_equal(decode(data, image.height, image.width), pillow(data))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "gray"])
def test_crops_are_cut_from_the_whole(layout: str, progressive: bool, photographs: list[Image.Image]) -> None:
    """Bit for bit, at every scale: upsampling at the edges of what was decoded never shows."""
    rng = np.random.default_rng(1)
    for image in (photographs[0].resize((201, 157)), noisy(rng, 119, 150)):
        if layout == "gray":
            data, height, width = encode(image.convert("L"), progressive=progressive), image.height, image.width
        else:
            data, height, width = laid_out(image, layout, whole_units=progressive, progressive=progressive)
        for scale in (1, 2, 4, 8):
            scaled = (-(-height // scale), -(-width // scale))
            whole = decode_box(data, height, width, (0, 0, *scaled), scale)
            assert whole is not None
            assert whole[1] == (0, 0, *scaled)
            for box in random_boxes(rng, *scaled, count=60):
                found = decode_box(data, height, width, box, scale)
                assert found is not None
                top, left, rows, columns = box
                np.testing.assert_array_equal(found[0], whole[0][top : top + rows, left : left + columns], f"{box}")


def test_crops_read_little_more_than_their_box(photographs: list[Image.Image]) -> None:
    data = encode(photographs[0])
    found = decode_box(data, 427, 640, (200, 300, 50, 60))
    assert found is not None
    top, left, rows, columns = found[1]
    assert (top, rows) == (184, 82)
    assert 300 - 32 < left <= 284
    assert columns <= 60 + 3 * 16 + 16


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_scaled_decodes_equal_pillows_draft(
    scale: int, layout: str, progressive: bool, photographs: list[Image.Image]
) -> None:
    for image in (photographs[0], photographs[1].resize((203, 101))):
        data, height, width = laid_out(image, layout, whole_units=progressive, progressive=progressive)
        draft = Image.open(io.BytesIO(data))
        draft.draft("RGB", (width // scale, height // scale))
        expected = np.array(draft)
        found = decode_box(data, height, width, (0, 0, *expected.shape[:2]), scale)
        assert found is not None
        assert expected.shape == (-(-height // scale), -(-width // scale), 3)
        np.testing.assert_array_equal(found[0], expected)


def spoilt(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed; sometimes a part lost or repeated."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        value = rng.integers(256) if rng.random() < 0.6 else rng.choice([0x00, 0xFF, 0xC2, 0xC4, 0xD0, 0xD9, 0xDA])
        result[rng.integers(2, len(result))] = int(value)
    start, end = sorted(int(place) for place in rng.integers(2, len(result), 2))
    return bytes((result, result[:end], result[:start] + result[end:], result[:end] + result[start:])[rng.integers(4)])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files_fail_or_give_an_image(layout: str, progressive: bool, photographs: list[Image.Image]) -> None:
    """Whatever the bytes are: no crash, nothing written beyond the image, a part that covers the box."""
    rng = np.random.default_rng(2)
    whole, height, width = laid_out(
        photographs[0].resize((75, 61)), layout, whole_units=progressive, progressive=progressive
    )
    passed = 0
    for _ in range(1200):
        scale = int(rng.choice([1, 2, 4, 8]))
        scaled = (-(-height // scale), -(-width // scale))
        box = random_boxes(rng, *scaled, count=1)[0]
        found = decode_box(spoilt(rng, whole), height, width, box, scale)
        if found is not None:
            passed += 1
            top, left, rows, columns = found[1]
            assert found[0].shape == (*box[2:], 3)
            assert 0 <= top <= box[0] < box[0] + box[2] <= top + rows <= scaled[0]
            assert 0 <= left <= box[1] < box[1] + box[3] <= left + columns <= scaled[1]
    assert 20 < passed < 1000, "damage outside of what is read passes, most is found"


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_refused(progressive: bool, photographs: list[Image.Image]) -> None:
    """Wherever they end, up to the last bytes of the last scan."""
    data = encode(photographs[0].resize((64, 48)), progressive=progressive)
    for length in range(len(data) - 3):
        assert decode(data[:length], 48, 64) is None, length
    for length in range(len(data) - 40):
        assert not decodes(data[:length], 48, 64), length
    assert decodes(data, 48, 64)


def test_what_is_not_a_jpeg_is_refused(photographs: list[Image.Image]) -> None:
    png = io.BytesIO()
    photographs[0].save(png, "PNG")
    rng = np.random.default_rng(3)
    for data in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", png.getvalue(), bytes(100_000), rng.bytes(100_000)):
        assert decode(data, 427, 640) is None
        assert not decodes(data, 427, 640)
        assert decode_box(b"\xff\xd8" + data, 427, 640, (5, 5, 10, 10)) is None


@pytest.mark.parametrize("size", [(61, 74), (60, 75), (75, 61), (1, 1), (0, 0), (122, 150), (61 + 65536, 75)])
def test_another_size_is_refused(size: tuple[int, int], photographs: list[Image.Image]) -> None:
    data = encode(photographs[0].resize((75, 61)))
    assert decode(data, 61, 75) is not None
    assert decode(data, *size) is None


@pytest.mark.parametrize("size", [(65500, 65500), (61, 65500), (65500, 75), (0, 75), (61, 0), (65535, 65535)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_claims_another_size_is_refused(
    size: tuple[int, int], progressive: bool, photographs: list[Image.Image]
) -> None:
    data = with_size(encode(photographs[0].resize((75, 61)), progressive=progressive), *size)
    assert decode(data, 61, 75) is None
    assert decode_box(data, 61, 75, (3, 3, 20, 20), 2) is None


@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_file_of_a_large_image_is_refused(progressive: bool, photographs: list[Image.Image]) -> None:
    """Even where its header is believed, and at once: it has not a thousandth of the data."""
    data = with_size(encode(photographs[0].resize((75, 61)), progressive=progressive), 20_000, 30_000)
    assert not decodes(data, 20_000, 30_000)


@pytest.mark.parametrize("precision", [2, 12, 16])
def test_other_precisions_are_refused(precision: int, photographs: list[Image.Image]) -> None:
    data = encode(photographs[0].resize((75, 61)))
    assert decode(edit(data, frame(data) + 4, 8), 61, 75) is not None
    assert decode(edit(data, frame(data) + 4, precision), 61, 75) is None


@pytest.mark.parametrize("transform", [0, 2])
def test_four_colors_are_refused(transform: int, photographs: list[Image.Image]) -> None:
    """CMYK, or YCCK where the Adobe marker says so."""
    data = encode(photographs[0].convert("CMYK"))
    data = edit(data, data.index(b"Adobe") + 11, transform)
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == transform
    assert decode(data, 427, 640) is None
    assert decode_box(data, 427, 640, (0, 0, 9, 9)) is None


@pytest.mark.parametrize("progressive", [False, True])
def test_small_decodes_find_what_whole_ones_find(progressive: bool, photographs: list[Image.Image]) -> None:
    data, rng = encode(photographs[0].resize((75, 61)), progressive=progressive), np.random.default_rng(4)
    results = []
    for _ in range(500):
        damaged = spoilt(rng, data)
        results.append((decode(damaged, 61, 75) is not None, decodes(damaged, 61, 75)))
    assert {(True, True), (False, False)} == set(results)


def test_damage_below_the_crop_does_not_change_it(photographs: list[Image.Image]) -> None:
    """It is not even read. The checksum of the file is somebody else's."""
    data = encode(photographs[0])
    cut = data[: len(data) // 2]
    found = decode_box(cut, 427, 640, (10, 20, 100, 300))
    assert found is not None
    np.testing.assert_array_equal(found[0], pillow(data)[10:110, 20:320])
    assert decode_box(cut, 427, 640, (300, 20, 100, 300)) is None


def test_threads_decode_for_themselves(photographs: list[Image.Image]) -> None:
    """Sound and damaged files at the same time, each with its own errors."""
    images = [photographs[n % 2].resize((150 + n, 120 + 2 * n)) for n in range(8)]
    files = [(encode(image, progressive=n % 3 == 0), image.height, image.width) for n, image in enumerate(images)]
    files += [(data[: len(data) // 2], height, width) for data, height, width in files]
    expected = [decode(*file) for file in files]
    assert [image is None for image in expected] == [False] * 8 + [True] * 8
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(lambda n: decode(*files[n % 16]), range(400))):
            np.testing.assert_array_equal(found, expected[number % 16])  # pyright: ignore


def test_without_headers_the_build_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pipeline/images").mkdir(parents=True)
    for name in ("setup.py", "pipeline/images/_jpeg.c"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "jpeglib.h").write_text('#error "as if it were missing"\n')
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tmp_path,
        env=os.environ | {"CFLAGS": f"-I{tmp_path / 'include'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "as if it were missing" in result.stderr
    assert "libjpeg-dev" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
