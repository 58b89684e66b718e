"""Packing: bytes kept or converted, whole files or none."""

import errno
import io
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.small_packs import BAD, contents, encoded, jpeg, pack_folder, read, spoil
from PIL import Image, ImageOps

from softshard.pipeline.images.beton import (
    Beton,
    manifest_path,
    open_beton,
)
from softshard.pipeline.images.jpeg import decodes
from softshard.pipeline.images.manifest import PackManifest, key_digest
from softshard.pipeline.images.pack import _eight_bits, encode
from softshard.pipeline.recipes.recipe import PackRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader

ORIENTATION = 0x0112


# Rows


def test_jpegs_pass_through_byte_for_byte(photo_folder: Path, photos: Beton) -> None:
    assert len(photos) == 22
    for row, key in enumerate(photos.manifest.keys):
        source = (photo_folder / key).read_bytes()
        assert jpeg(photos, row) == source, key
        assert (photos.widths[row], photos.heights[row]) == read(source).size
    modes = {(read(jpeg(photos, row)).mode, "progressive" in read(jpeg(photos, row)).info) for row in range(22)}
    assert modes == {("RGB", False), ("RGB", True), ("L", False)}
    assert (photos.manifest.converted, photos.manifest.skipped) == ({}, ())


def test_rows_are_in_the_order_of_their_keys(root: Path) -> None:
    (root / "a" / "deep" / "er").mkdir(parents=True)
    for name in ("a/deep/er/1.jpg", "a/deep-1.jpg", "a/Z.JPEG", "a-b/0.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "a" / "0.jpg", root / name)
    (root / "a" / "notes.txt").write_text("not an image")
    manifest, beton = pack_folder(root)
    keys = ["a-b/0.jpg", "a/0.jpg", "a/1.jpg", "a/Z.JPEG", "a/deep-1.jpg", "a/deep/er/1.jpg", "b/0.jpg", "b/1.jpg"]
    assert list(manifest.keys) == keys
    assert manifest.classes == ("a", "a-b", "b")
    assert beton.labels.tolist() == [1, 0, 0, 0, 0, 0, 2, 2]
    assert beton.keys.tolist() == [key_digest(key) for key in keys]


def test_key_digest_is_blake2b() -> None:
    """As `b2sum --length=64` prints it, read as a little-endian integer."""
    digest = bytes.fromhex("e9c4bdafef9197a5")
    assert key_digest("n01440764/n01440764_18.JPEG") == int.from_bytes(digest, "little")


def test_manifest_describes_every_row(photos: Beton) -> None:
    bytes_of_rows = [jpeg(photos, row) for row in range(len(photos))]
    assert list(photos.manifest.sizes) == [len(data) for data in bytes_of_rows]
    assert photos.crc32.tolist() == [zlib.crc32(data) for data in bytes_of_rows]
    assert photos.manifest.beton_bytes == photos.path.stat().st_size
    assert photos.manifest.libraries["ffcv"]
    recipe = load_recipe(PackRecipe, photos.path.with_suffix(".recipe.yaml"))
    assert recipe == photos.manifest.recipe


def test_two_packs_are_identical(root: Path, packed: Path) -> None:
    files = [packed, manifest_path(packed), packed.with_suffix(".recipe.yaml")]
    first = [file.read_bytes() for file in files]
    pack_folder(root)
    assert [file.read_bytes() for file in files] == first
    assert sorted(path.name for path in packed.parent.iterdir()) == sorted(["images", *(file.name for file in files)])


# Conversions


def converted(root: Path, data: bytes, name: str = "odd.jpg", **changes) -> tuple[Image.Image, PackManifest]:
    """How an odd image beside the small data set comes out of the packed file."""
    (root / "a" / name).write_bytes(data)
    manifest, beton = pack_folder(root, **changes)
    row = manifest.keys.index(f"a/{name}")
    image = read(jpeg(beton, row))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (beton.widths[row], beton.heights[row]))
    assert decodes(jpeg(beton, row), image.height, image.width)
    return image, manifest


def assert_alike(image: Image.Image, expected: Image.Image, loss: float = 2.5) -> None:
    assert image.size == expected.size
    difference = np.abs(np.asarray(image, np.int64) - np.asarray(expected.convert("RGB"), np.int64))
    assert difference.mean() < loss, "more than a JPEG of quality 95 loses"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_other_formats_are_converted(kind: str, root: Path, photographs: list[Image.Image]) -> None:
    crop = photographs[0].crop((200, 100, 301, 177))
    image, manifest = converted(root, encoded(crop, kind), f"odd.{kind.lower()}")
    assert_alike(image, read(encoded(crop, kind)))
    assert manifest.converted == {kind.lower(): 1}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_other_modes_are_converted_as_pil_sees_them(
    mode: str, kind: str, root: Path, photographs: list[Image.Image]
) -> None:
    data = encoded(photographs[1].crop((200, 100, 301, 177)).convert(mode), kind)
    image, manifest = converted(root, data)
    assert_alike(image, read(data), 3.5 if mode == "P" else 2.5)  # a palette is dithered: noise that a JPEG loses
    assert manifest.converted == {"cmyk" if kind == "JPEG" else kind.lower(): 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, root: Path, photographs: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG", quality=95, exif=exif)
    image, manifest = converted(root, data)
    assert_alike(image, ImageOps.exif_transpose(read(data)))
    assert manifest.converted == ({} if orientation == 1 else {"rotated": 1})


@pytest.mark.parametrize(("max_side", "size"), [(64, (64, 49)), (101, (101, 77)), (1, (1, 1))])
def test_max_side(max_side: int, size: tuple[int, int], root: Path, photographs: list[Image.Image]) -> None:
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG")
    image, manifest = converted(root, data, max_side=max_side)
    expected = read(data)
    expected.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    assert image.size == size
    assert_alike(image, expected)
    assert manifest.converted == ({} if max_side == 101 else {"oversize": 5}), (
        "the other four are 90 and 91 pixels wide"
    )


def test_a_photograph_with_others_behind_it_passes_through(root: Path, photographs: list[Image.Image]) -> None:
    """Phones write such files (MPO)."""
    front, behind = (photograph.crop((200, 100, 301, 177)) for photograph in photographs)
    data = encoded(front, "MPO", save_all=True, append_images=[behind])
    (root / "a" / "2.jpg").write_bytes(data)
    manifest, beton = pack_folder(root)
    assert manifest.converted == {}
    assert jpeg(beton, 2) == data
    [batch] = ViewLoader(beton, None, 77, 8, 1, torch.device("cpu")).render(np.array([2]), CENTER)
    expected = np.asarray(read(data).crop((12, 0, 89, 77)), int)
    difference = np.abs(batch.images[0].permute(1, 2, 0).numpy() - expected)
    assert difference.mean() < 4, "turbojpeg's fast inverse DCT and PIL's exact one differ by a few steps"


def test_a_jpeg_that_only_pil_decodes_is_converted(root: Path, photographs: list[Image.Image]) -> None:
    """Turbojpeg warns of damaged entropy data, which the loader would take for a failure; PIL shows what there is."""
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG", quality=95)
    for position in range(len(data) // 2, len(data)):
        damaged = data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]
        if b"\xff" not in damaged[position - 1 : position + 2] and not decodes(damaged, 77, 101):
            break
    image, manifest = converted(root, damaged)
    assert_alike(image, read(damaged))
    assert manifest.converted == {"refused": 1}


def palette(crop: Image.Image) -> bytes:
    """Eight colors, the first of them transparent."""
    return encoded(crop.quantize(8, dither=Image.Dither.NONE), "PNG", transparency=0)


def with_alpha(mode: str) -> Callable[[Image.Image], bytes]:
    def make(crop: Image.Image) -> bytes:
        alpha = Image.linear_gradient("L").resize(crop.size)
        image = crop.convert(mode)
        image.putalpha(alpha)
        return encoded(image, "PNG")

    return make


def deep_color(crop: Image.Image) -> bytes:
    """A PNG of three channels with 16 bits, which PIL cannot write: OpenCV does."""
    done, data = cv2.imencode(".png", np.asarray(crop).astype(np.uint16)[..., ::-1] * 257)
    assert done
    return data.tobytes()


def adobe(crop: Image.Image) -> bytes:
    """An inverted CMYK JPEG with Adobe's marker, as Photoshop and PIL write it; its transform says YCCK."""
    data = encoded(crop.convert("CMYK"), "JPEG", quality=95)
    marker = data.index(b"Adobe")
    return data[: marker + 11] + b"\2" + data[marker + 12 :]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (palette, "png"),
        (with_alpha("RGB"), "png"),
        (with_alpha("L"), "png"),
        (deep_color, "png"),
        (adobe, "cmyk"),
        (lambda crop: encoded(crop, "WEBP", lossless=True), "webp"),
        (lambda crop: encoded(crop, "GIF"), "gif"),
    ],
)
def test_odd_images_look_as_pil_sees_them(
    make: Callable[[Image.Image], bytes], kind: str, photographs: list[Image.Image]
) -> None:
    data = make(photographs[1].crop((200, 100, 301, 177)))
    result = encode(data, None)
    assert result.reason == kind
    assert_alike(read(result.jpeg), read(data), 5.0 if kind == "gif" else 2.5)


def gray16(values: np.ndarray, kind: str) -> bytes:
    if kind == "PPM":  # PIL writes it, but reads it as 32-bit integers
        return b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()
    big_endian = kind == "TIFF"
    return encoded(Image.fromarray(values.astype(">u2" if big_endian else "<u2")), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled(kind: str, photographs: list[Image.Image]) -> None:
    """PIL would clip at 255: nearly white."""
    gray = np.asarray(photographs[0].crop((200, 100, 301, 177)).convert("L"))
    noise = np.random.default_rng(0).integers(-128, 129, gray.shape)
    result = encode(gray16((gray.astype(int) * 257 + noise).clip(0, 65535), kind), None)
    assert result.reason == "16-bit"
    assert_alike(read(result.jpeg), Image.fromarray(gray))


def test_16_bit_gray_is_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    scaled = np.asarray(_eight_bits(Image.fromarray(values)))
    np.testing.assert_array_equal(scaled, np.rint(values / 257))


def test_16_bit_gray_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    values = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
    data = encoded(Image.fromarray(values), "PNG", exif=exif)
    result = encode(data, None)
    assert (result.width, result.height, result.reason) == (60, 80, "16-bit")
    assert_alike(read(result.jpeg), Image.fromarray(np.rot90(np.rint(values / 257), 3).astype(np.uint8)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((50, 100), 0.5, np.float32), "its samples are floating-point numbers"),
        (np.full((50, 100), 65536, np.int32), "its samples have more than 16 bits: from 65536 to 65536"),
        (np.full((50, 100), -1, np.int32), "its samples have more than 16 bits: from -1 to -1"),
    ],
)
def test_an_image_of_more_than_16_bits_is_bad(values: np.ndarray, message: str, root: Path) -> None:
    (root / "a" / "deep.tif").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    with pytest.raises(DataError, match=rf"a/deep\.tif: expected an image, .* does not decode \({message}\)"):
        pack_folder(root)


def test_the_first_reason_counts(photographs: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    crop = photographs[0].crop((200, 100, 301, 177))
    reasons = [
        encode(encoded(crop, "PNG", exif=exif), 50).reason,
        encode(encoded(crop.convert("CMYK"), "JPEG", exif=exif), 50).reason,
        encode(encoded(crop, "JPEG", exif=exif), 50).reason,
        encode(encoded(crop, "JPEG"), 50).reason,
    ]
    assert reasons == ["png", "cmyk", "rotated", "oversize"]


def test_conversions_are_counted_by_reason(root: Path, photographs: list[Image.Image]) -> None:
    crop = photographs[0].crop((200, 100, 301, 177))
    for number, (kind, image) in enumerate([("PNG", crop), ("WEBP", crop), ("PNG", crop.convert("L"))]):
        (root / "a" / f"odd{number}.png").write_bytes(encoded(image, kind))
    (root / "b" / "cmyk.jpg").write_bytes(encoded(crop.convert("CMYK"), "JPEG"))
    manifest, beton = pack_folder(root)
    assert manifest.converted == beton.manifest.converted == {"cmyk": 1, "png": 2, "webp": 1}


def test_an_image_too_wide_for_jpeg_is_bad(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "a" / "wide.png").write_bytes(encoded(Image.new("RGB", (66000, 2)), "PNG"))
    with pytest.raises(DataError, match=r"a/wide\.png: expected"):
        pack_folder(root)
    manifest, _ = pack_folder(root, max_side=512)
    assert "a/wide.png" in manifest.keys


# Bad images


each_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


@each_bad
def test_a_bad_image_leaves_nothing(bad: Callable[[bytes], bytes], root: Path) -> None:
    spoil(root, "b/0.jpg", bad)
    with pytest.raises(DataError, match=r"images/b/0\.jpg: .* does not decode \(.+\); .* on_bad_image: skip"):
        pack_folder(root)
    assert [path.name for path in root.parent.iterdir()] == ["images"]


@each_bad
def test_bad_images_are_skipped_on_request(bad: Callable[[bytes], bytes], root: Path) -> None:
    good = (root / "b" / "1.jpg").read_bytes()
    spoil(root, "a/1.jpg", bad)
    spoil(root, "b/0.jpg", bad)
    manifest, beton = pack_folder(root, on_bad_image="skip")
    assert (manifest.keys, manifest.skipped) == (("a/0.jpg", "b/1.jpg"), ("a/1.jpg", "b/0.jpg"))
    assert beton.labels.tolist() == [0, 1]
    assert jpeg(beton, 1) == good


def test_nothing_but_bad_images(root: Path) -> None:
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="expected at least one image that decodes, found none of 4"):
        pack_folder(root, on_bad_image="skip")
    assert [path.name for path in root.parent.iterdir()] == ["images"]


# Failures in the middle


def test_an_older_file_survives_a_bad_image(root: Path, packed: Path) -> None:
    before = contents(packed.parent)
    spoil(root, "b/1.jpg")
    with pytest.raises(DataError, match="does not decode"):
        pack_folder(root)
    assert contents(packed.parent) == before
    assert len(open_beton(packed)) == 4


class FullDisk:
    """Lets a .partial file of the given kind grow to `room` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, room: int) -> None:
        self.kind, self.room, self.open = kind, room, io.open
        monkeypatch.setattr(Path, "open", lambda path, *args, **options: self.opened(path, *args, **options))
        monkeypatch.setattr(Path, "write_text", lambda path, text, **_: self.write(path, text))

    def opened(self, path: Path, *args, **options):
        file = self.open(path, *args, **options)
        if path.suffix == ".partial" and self.kind in path.suffixes and file.writable():
            write = file.write
            file = _Forwarding(file, lambda data: self.spend(len(data)) and write(data))
        return file

    def write(self, path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text)

    def spend(self, size: int) -> bool:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return True


class _Forwarding:
    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


@pytest.mark.parametrize(("kind", "room"), [(".beton", 0), (".beton", 5000), (".manifest", 0)])
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_what_was_there(
    kind: str, room: int, older: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older:
        pack_folder(root)
        spoil(root, "a/0.jpg", lambda _: (root / "b" / "0.jpg").read_bytes())
    before = contents(root.parent)
    with monkeypatch.context() as patch:
        FullDisk(patch, kind, room)
        with pytest.raises(OSError, match="No space left"):
            pack_folder(root)
    assert contents(root.parent) == before
    pack_folder(root)


def test_no_room_is_noticed_before_the_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))  # pyright: ignore
    with pytest.raises(DataError, match=r"images\.beton: expected .* MB of free disk, found 0 MB; make room"):
        pack_folder(root)
    assert contents(root.parent) == {}


def test_a_crash_between_the_two_files_is_noticed(root: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The .beton is new, its manifest is not there yet: never an old manifest beside a new file."""
    spoil(root, "a/0.jpg", lambda _: (root / "b" / "0.jpg").read_bytes())

    def replace(source, target, replace=os.replace) -> None:
        if ".manifest" in Path(target).suffixes:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(root)
    with pytest.raises(DataError, match=r"expected the manifest of the \.beton beside it, found none"):
        open_beton(packed)
