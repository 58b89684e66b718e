"""Packing: bytes kept or converted, whole files or none, and files that are opened only when they are whole."""

import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, HeaderType
from PIL import Image, ImageOps

from pipeline import beton as beton_module
from pipeline import manifest as manifest_module
from pipeline.beton import (
    ROW_TYPE,
    Beton,
    PackedImage,
    decodes,
    kept_threads,
    manifest_path,
    open_beton,
    tables_crc32,
    write_beton,
)
from pipeline.errors import DataError, FormatError
from pipeline.loader import ViewLoader, _uncompiled
from pipeline.manifest import PackManifest, key_digest, key_digests
from pipeline.pack import pack
from pipeline.recipe import PackRecipe, SourceRecipe, load_recipe
from pipeline.views import CENTRE

ORIENTATION = 0x0112


def recipe_for(root: Path, output: Path, **changes) -> PackRecipe:
    return PackRecipe(source=SourceRecipe(kind="imagefolder", path=str(root)), output=str(output), **changes)


def pack_folder(root: Path, **changes) -> tuple[PackManifest, Beton]:
    """The manifest that `pack` returned and the file it made."""
    output = root.with_suffix(".beton")
    return pack(recipe_for(root, output, **changes)), open_beton(output)


def jpeg(beton: Beton, row: int) -> bytes:
    start = int(beton.offsets[row])
    return beton.path.read_bytes()[start : start + int(beton.lengths[row])]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture
def root(tmp_path: Path, photographs: list[Image.Image]) -> Path:
    """A small data set: two classes of two JPEGs each."""
    for photograph, name in zip(photographs, "ab", strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            crop = photograph.crop((0, 0, 90 + number, 70))
            crop.save(tmp_path / "images" / name / f"{number}.jpg")
    return tmp_path / "images"


@pytest.fixture
def packed(root: Path) -> Path:
    """The .beton of the small data set."""
    return pack_folder(root)[1].path


# Rows


def test_jpegs_pass_through_byte_for_byte(photo_folder: Path, photos: Beton) -> None:
    assert len(photos) == 22
    for row, key in enumerate(photos.manifest.keys):
        source = (photo_folder / key).read_bytes()
        assert jpeg(photos, row) == source, key
        assert (photos.widths[row], photos.heights[row]) == read(source).size
    modes = {(read(jpeg(photos, row)).mode, "progressive" in read(jpeg(photos, row)).info) for row in range(22)}
    assert modes == {("RGB", False), ("RGB", True), ("L", False)}
    assert (photos.manifest.converted, photos.manifest.skipped) == (0, ())


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
    assert manifest.converted == 1


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
    assert manifest.converted == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, root: Path, photographs: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG", quality=95, exif=exif)
    image, manifest = converted(root, data)
    assert_alike(image, ImageOps.exif_transpose(read(data)))
    assert manifest.converted == (orientation != 1)


@pytest.mark.parametrize(("max_side", "size"), [(64, (64, 49)), (101, (101, 77)), (1, (1, 1))])
def test_max_side(max_side: int, size: tuple[int, int], root: Path, photographs: list[Image.Image]) -> None:
    data = encoded(photographs[0].crop((200, 100, 301, 177)), "JPEG")
    image, manifest = converted(root, data, max_side=max_side)
    expected = read(data)
    expected.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    assert image.size == size
    assert_alike(image, expected)
    assert manifest.converted == {64: 5, 101: 0, 1: 5}[max_side], "the other four are 90 and 91 pixels wide"


def test_a_photograph_with_others_behind_it_passes_through(root: Path, photographs: list[Image.Image]) -> None:
    """Phones write such files (MPO)."""
    front, behind = (photograph.crop((200, 100, 301, 177)) for photograph in photographs)
    data = encoded(front, "MPO", save_all=True, append_images=[behind])
    (root / "a" / "2.jpg").write_bytes(data)
    manifest, beton = pack_folder(root)
    assert manifest.converted == 0
    assert jpeg(beton, 2) == data
    [batch] = ViewLoader(beton, None, 77, 8, 1, torch.device("cpu")).render(np.array([2]), CENTRE)
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
    assert manifest.converted == 1


def test_an_image_of_more_than_8_bits_is_bad(root: Path) -> None:
    """PIL would clip its samples at 255: nearly white."""
    deep = Image.fromarray(np.arange(5000, dtype=np.uint16).reshape(50, 100))
    (root / "a" / "deep.png").write_bytes(encoded(deep, "PNG"))
    with pytest.raises(DataError, match=r"a/deep\.png: expected an 8-bit image, .* more than 8 bits"):
        pack_folder(root)


def test_an_image_too_wide_for_jpeg_is_bad(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "a" / "wide.png").write_bytes(encoded(Image.new("RGB", (66000, 2)), "PNG"))
    with pytest.raises(DataError, match=r"a/wide\.png: expected"):
        pack_folder(root)
    manifest, _ = pack_folder(root, max_side=512)
    assert "a/wide.png" in manifest.keys


# Layout


def test_stock_ffcv_reads_the_same_pixels(photos: Beton, cpu: torch.device) -> None:
    with kept_threads(), _uncompiled():
        decoder = CenterCropRGBImageDecoder((48, 48), ratio=1.0)
        stock = Loader(
            str(photos.path),
            len(photos),
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={"image": [decoder]},
        )
        [(pixels, labels)] = stock
    [batch] = ViewLoader(photos, None, 48, len(photos), 1, cpu).render(np.arange(len(photos)), CENTRE)
    np.testing.assert_array_equal(pixels, batch.images.permute(0, 2, 3, 1).numpy())
    assert np.asarray(labels).ravel().tolist() == photos.labels.tolist()


def test_no_image_crosses_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_module, "MIN_PAGE_BYTES", 1 << 12)
    random = np.random.default_rng(0)
    lengths = [4096, 1, 4095, 4096, 1, 4096, *random.integers(1, 4097, 400).tolist()]
    images = [PackedImage(random.bytes(length), 1, 1, 0) for length in lengths]
    size = write_beton(tmp_path / "f.beton", images, len(images) + 300, 1200)
    reader, data = Reader(str(tmp_path / "f.beton")), (tmp_path / "f.beton").read_bytes()
    page, places = int(reader.page_size), reader.alloc_table
    assert (page, len(data), len(places)) == (4096, size, len(images))
    starts, ends = places["ptr"], places["ptr"] + places["size"]
    assert (starts // page == (ends - 1) // page).all()
    assert starts[0] >= 2 * 1040 + ROW_TYPE.itemsize * (len(images) + 300), "room for the rows that were announced"
    assert (starts[1:] >= ends[:-1]).all()
    assert [data[start:end] for start, end in zip(starts, ends, strict=True)] == [image.jpeg for image in images]


@pytest.mark.parametrize(("largest", "page"), [(1, 1 << 21), (1 << 20, 1 << 21), ((1 << 20) + 1, 1 << 22)])
def test_a_page_holds_two_of_the_largest_image(largest: int, page: int, tmp_path: Path) -> None:
    write_beton(tmp_path / "f.beton", [PackedImage(b"jpeg", 1, 1, 0)], 1, largest)
    assert Reader(str(tmp_path / "f.beton")).page_size == page


def test_an_image_larger_than_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_module, "MIN_PAGE_BYTES", 1 << 12)
    with pytest.raises(DataError, match="row 0: expected a JPEG below 4096 bytes, found 4097; set max_side"):
        write_beton(tmp_path / "f.beton", [PackedImage(bytes(4097), 1, 1, 0)], 1, 10)


# Bad images


BAD = {
    "truncated": lambda data: data[: len(data) // 2],
    "text": lambda data: b"this is not an image\n" * 40,
    "empty": lambda data: b"",
}
each_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


def spoil(root: Path, key: str, bad: Callable[[bytes], bytes] = BAD["truncated"]) -> None:
    (root / key).write_bytes(bad((root / key).read_bytes()))


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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


# Folders, classes and keys


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source\.path: expected a folder of class folders, found nothing at '.*none'"):
        pack_folder(tmp_path / "none")


def test_images_outside_class_folders(tmp_path: Path, photographs: list[Image.Image]) -> None:
    (tmp_path / "images").mkdir()
    for _ in range(2):  # an empty folder, then one with an image in the wrong place
        with pytest.raises(DataError, match=r"expected class folders in .*, found none; images belong in root/CLASS/"):
            pack_folder(tmp_path / "images")
        photographs[0].save(tmp_path / "images" / "0.jpg")


def test_empty_class_folder(root: Path) -> None:
    (root / "c" / "deeper").mkdir(parents=True)
    (root / "c" / "readme.md").write_text("nothing here")
    with pytest.raises(DataError, match="expected images in every class folder, found none in 'c'; add or remove them"):
        pack_folder(root)


def test_class_list_gives_the_order(root: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("b\n\nwithout images\n a \n", encoding="utf-8")
    manifest, beton = pack_folder(root, classes=str(tmp_path / "names"))
    assert manifest.classes == ("b", "without images", "a")
    assert manifest.keys == ("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
    assert beton.labels.tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"b\nc\n", r"images: expected folders named in the class list, found 'a'; add or remove them"),
        (b"a\nb\na\nc\nc\n", r"names: expected different class names, one a line, found 'a', 'c'"),
        (b"\n \n", r"names: expected different class names, one a line, found none"),
        (b"\xff\xfe", r"classes: expected a readable file with one class name a line, found: .*decode"),
        (None, r"classes: expected a readable file with one class name a line, found: .*No such file"),
    ],
)
def test_wrong_class_lists(names: bytes | None, message: str, root: Path, tmp_path: Path) -> None:
    if names is not None:
        (tmp_path / "names").write_bytes(names)
    with pytest.raises(DataError, match=message):
        pack_folder(root, classes=str(tmp_path / "names"))


def test_one_key_twice() -> None:
    assert key_digests(["a/1", "a/2"]).dtype == np.uint64
    with pytest.raises(DataError, match=r"found the key 'a/1' twice \(1 such pairs\); rename or remove"):
        key_digests(["a/1", "b/1", "a/1"])


def test_colliding_digests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "key_digest", lambda key: zlib.crc32(key.encode()) % 2)
    with pytest.raises(DataError, match=r"found the keys '.*' and '.*' with one digest \(2 such pairs\)"):
        pack_folder(root)
    assert contents(root.parent) == {}


def test_a_file_name_that_is_not_utf8(root: Path) -> None:
    (root / "a" / "0.jpg").rename(root / "a" / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(DataError, match=r"expected file names in UTF-8, found 'a/caf\\udce9\.jpg'; rename it"):
        pack_folder(root)


# Opening


def edit(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def edit_manifest(path: Path, **changes) -> None:
    """Change keys of the manifest beside a .beton, and make it fit the tables that are in the file now."""
    fields = json.loads(manifest_path(path).read_text())
    fields["tables_crc32"] = tables_crc32(path, len(fields["keys"]))
    manifest_path(path).write_text(json.dumps(fields | changes))


def test_missing_files(packed: Path) -> None:
    manifest_path(packed).unlink()
    with pytest.raises(DataError, match=r"images\.manifest\.json: expected the manifest of the \.beton beside it"):
        open_beton(packed)
    packed.unlink()
    with pytest.raises(DataError, match=r"images\.beton: expected a packed image file, found none; .* pipeline pack"):
        open_beton(packed)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda _: b""])
def test_a_file_of_another_length(change: Callable[[bytes], bytes], packed: Path) -> None:
    packed.write_bytes(change(packed.read_bytes()))
    with pytest.raises(FormatError, match=r"images\.beton: expected \d+ bytes, as images\.manifest\.json says, found"):
        open_beton(packed)


def test_garbage_of_the_right_length(packed: Path) -> None:
    packed.write_bytes(np.random.default_rng(0).bytes(packed.stat().st_size))
    with pytest.raises(FormatError, match=r"expected the header and tables that .* records, found others"):
        open_beton(packed)
    edit_manifest(packed)
    with pytest.raises(FormatError, match=r"expected FFCV format 2 .*, found: .*; pack again"):
        open_beton(packed)


def test_every_byte_of_the_tables_counts(packed: Path) -> None:
    data = packed.read_bytes()
    fields = HeaderType.itemsize + 2 * 1041
    tables = [*range(0, fields, 97), *range(fields, fields + 4 * ROW_TYPE.itemsize)]
    for position in [*tables, *range(len(data) - 4 * ALLOC_TABLE_TYPE.itemsize, len(data))]:
        edit(packed, position, bytes([data[position] ^ 1]))
        with pytest.raises(FormatError, match="expected the header and tables"):
            open_beton(packed)
        edit(packed, position, data[position : position + 1])
    assert len(open_beton(packed)) == 4


def test_a_header_of_another_version(packed: Path) -> None:
    edit(packed, 0, b"\3")
    edit_manifest(packed)
    with pytest.raises(FormatError, match=r"expected FFCV format 2 .*, found: .*file=3; pack again"):
        open_beton(packed)


ROWS_START = HeaderType.itemsize + 2 * beton_module.FieldDescType.itemsize


@pytest.mark.parametrize(
    ("row", "table", "message"),
    [
        ({}, {"ptr": 1 << 40}, "rows that point outside the image data"),
        ({"data_ptr": 1 << 40}, {}, "rows that point outside the image data"),
        ({"data_ptr": 2**64 - 9}, {"ptr": 2**64 - 9}, "rows that point outside the image data"),
        ({}, {"size": 1 << 40}, "rows that point outside the image data"),
        ({}, {"size": 2**64 - 9}, "rows that point outside the image data"),
        ({}, {"size": 1}, "image sizes that differ from the manifest's"),
        ({"height": 0}, {}, "rows that are not JPEGs"),
        ({"mode": 1}, {}, "rows that are not JPEGs"),
        ({"label": 2}, {}, "labels outside the class list"),
        ({"label": -1}, {}, "labels outside the class list"),
    ],
)
def test_tables_that_make_no_sense(row: dict, table: dict, message: str, packed: Path) -> None:
    """Not damage, which the checksum shows: files that something else wrote."""
    rows = np.frombuffer(packed.read_bytes(), ROW_TYPE, 4, ROWS_START).copy()
    places = np.frombuffer(packed.read_bytes()[-4 * ALLOC_TABLE_TYPE.itemsize :], ALLOC_TABLE_TYPE).copy()
    for name, value in row.items():
        if name == "label":
            rows["f1"][1] = value
        else:
            rows["f0"][name][1] = value
    for name, value in table.items():
        places[name][1] = value
    edit(packed, ROWS_START, rows.tobytes())
    edit(packed, packed.stat().st_size - places.nbytes, places.tobytes())
    edit_manifest(packed)
    with pytest.raises(FormatError, match=f"expected FFCV format 2 .*, found: {message}; pack again"):
        open_beton(packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "found: version: "),
        ({"format": "softshard-labels"}, "found: format: "),
        ({"colour": "red"}, "found: colour: Extra inputs"),
        ({"keys": ["a/0.jpg"]}, "differ in length"),
        ({"crc32": [0]}, "differ in length"),
        ({"crc32": [0, 1, 2, -3]}, "found: crc32.3: "),
        ({"crc32": [0, 1, 2, 2**32]}, "found: crc32.3: "),
        ({"sizes": [1, 2, 3, -4]}, "found: sizes.3: "),
        ({"keys": [], "crc32": [], "sizes": []}, "found: keys: "),
    ],
)
def test_wrong_manifests(changes: dict, message: str, packed: Path) -> None:
    edit_manifest(packed, **changes)
    with pytest.raises(FormatError, match=rf"manifest\.json: expected a manifest of version 1, .*{message}.*; pack"):
        open_beton(packed)


@pytest.mark.parametrize("text", [b"", b'{"format": "softshard-beton",', b"[]", b"\xff\xfe"])
def test_manifests_that_are_not_json(text: bytes, packed: Path) -> None:
    manifest_path(packed).write_bytes(text)
    with pytest.raises(FormatError, match=r"manifest\.json: expected a manifest of version 1, found: .*; pack again"):
        open_beton(packed)


def test_a_manifest_with_a_row_more(packed: Path) -> None:
    fields = json.loads(manifest_path(packed).read_text())
    changes = {name: [*fields[name], more] for name, more in (("keys", "b/2.jpg"), ("crc32", 1), ("sizes", 1))}
    edit_manifest(packed, **changes)
    with pytest.raises(FormatError, match="expected the header and tables"):
        open_beton(packed)


def test_a_manifest_of_a_file_with_the_same_length(root: Path, packed: Path) -> None:
    """Images of the same sizes in another order."""
    older = manifest_path(packed).read_bytes()
    first, second = (root / "a" / "0.jpg", root / "b" / "1.jpg")
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    pack_folder(root)
    manifest_path(packed).write_bytes(older)
    with pytest.raises(FormatError, match="expected the header and tables"):
        open_beton(packed)
