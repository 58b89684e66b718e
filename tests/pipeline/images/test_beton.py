"""The .beton: laid out as FFCV reads it, opened only when it is whole."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENCODINGS
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, HeaderType
from helpers.small_packs import edit, edit_manifest, encoded, jpeg, pack_folder
from PIL import Image

from softshard.pipeline.images import beton as beton_module
from softshard.pipeline.images.beton import (
    ROW_TYPE,
    Beton,
    PackedImage,
    kept_threads,
    manifest_path,
    open_beton,
    write_beton,
)
from softshard.pipeline.images.jpeg import decode, decodes
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader, _uncompiled

# Layout


def test_stock_ffcv_reads_the_same_images(digits: Beton, cpu: torch.device) -> None:
    """Without resizing, its faster and coarser inverse transform is the only difference."""
    with kept_threads(), _uncompiled():
        decoder = CenterCropRGBImageDecoder((28, 28), ratio=1.0)
        stock = Loader(
            str(digits.path),
            len(digits),
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={"image": [decoder]},
        )
        [(pixels, labels)] = stock
    [batch] = ViewLoader(digits, None, 28, len(digits), 1, cpu).render(np.arange(len(digits)), CENTER)
    difference = np.abs(pixels.astype(int) - batch.images.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 6
    assert difference.mean() < 1
    assert np.asarray(labels).ravel().tolist() == digits.labels.tolist()


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


@pytest.mark.parametrize("options", ENCODINGS)
def test_checking_at_an_eighth_refuses_what_a_full_decode_refuses(
    options: dict, photographs: list[Image.Image]
) -> None:
    data = encoded(photographs[0].crop((200, 100, 333, 177)), "JPEG", quality=90, **options)
    random, refused = np.random.default_rng(0), 0
    for _ in range(500):
        damaged = bytearray(data[: int(random.integers(1, 2 * len(data)))])
        for position in random.integers(0, len(damaged), random.integers(0, 4)):
            damaged[position] = random.integers(256)
        expected = decode(bytes(damaged), 77, 133) is not None
        assert decodes(bytes(damaged), 77, 133) == expected
        refused += not expected
    assert 200 < refused < 500


def test_images_of_every_size_decode(photos: Beton) -> None:
    for row in range(len(photos)):
        assert decodes(jpeg(photos, row), int(photos.heights[row]), int(photos.widths[row]))
        assert not decodes(jpeg(photos, row)[:-40], int(photos.heights[row]), int(photos.widths[row]))


# Opening


def test_missing_files(packed: Path) -> None:
    manifest_path(packed).unlink()
    with pytest.raises(DataError, match=r"images\.manifest\.json: expected the manifest of the \.beton beside it"):
        open_beton(packed)
    packed.unlink()
    with pytest.raises(DataError, match=r"images\.beton: expected a packed image .*, found none; .* `softshard pack`"):
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
        ({"version": 2}, "found problems: version: "),
        ({"format": "softshard-labels"}, "found problems: format: "),
        ({"color": "red"}, "found problems: color: Extra inputs"),
        ({"keys": ["a/0.jpg"]}, "differ in length"),
        ({"crc32": [0]}, "differ in length"),
        ({"crc32": [0, 1, 2, -3]}, "found problems: crc32.3: "),
        ({"crc32": [0, 1, 2, 2**32]}, "found problems: crc32.3: "),
        ({"sizes": [1, 2, 3, -4]}, "found problems: sizes.3: "),
        ({"keys": [], "crc32": [], "sizes": []}, "found problems: keys: "),
    ],
)
def test_wrong_manifests(changes: dict, message: str, packed: Path) -> None:
    edit_manifest(packed, **changes)
    with pytest.raises(FormatError, match=rf"manifest\.json: expected a manifest of version 1, .*{message}.*; copy it"):
        open_beton(packed)


@pytest.mark.parametrize("text", [b"", b'{"format": "softshard-beton",', b"[]", b"\xff\xfe"])
def test_manifests_that_are_not_json(text: bytes, packed: Path) -> None:
    manifest_path(packed).write_bytes(text)
    with pytest.raises(
        FormatError, match=r"manifest\.json: expected a manifest of version 1, found: .*; copy it again, or pack again"
    ):
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
