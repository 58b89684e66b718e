"""Parquet files of the Hugging Face layout: what they hold, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.small_sources import table, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from softshard.pipeline.images.sources import open_source
from softshard.pipeline.images.sources.contract import Source
from softshard.pipeline.recipes.recipe import ColumnsRecipe, SourceRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError

IMAGES = {f"{number}.jpg": (b"%d" % number, number % 2) for number in range(5)}


def open_parquet(path: Path | str, names: Path | None = None, **columns: str) -> Source:
    recipe = ColumnsRecipe(**columns) if columns else None
    return open_source(SourceRecipe(kind="parquet", path=str(path), columns=recipe), names)


def structs(values: list, path_type: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", path_type or pa.string())]))


@given(
    images=st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 1)), min_size=1, max_size=300),
    group=st.integers(1, 200),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    plain=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_parquet_layout_gives_bytes_back(
    images: list, group: int, compression: str, plain: bool, tmp_path: Path
) -> None:
    made = table({f"{number}.jpg": image for number, image in enumerate(images)})
    if plain:
        made = made.set_column(0, "image", pa.array([data for data, _ in images], pa.large_binary()))
    path = write_parquet(tmp_path / "f.parquet", made, row_group_size=group, compression=compression)
    source = open_parquet(path)
    assert [(item.read(), item.label) for item in source.samples] == images
    form = "f.parquet/{}" if plain else "{}.jpg"
    assert source.keys == [form.format(number) for number in range(len(images))]
    assert source.largest >= max(len(data) for data, _ in images)


def test_memory_holds_a_row_group_not_a_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(10_000_000)
    images = {str(start): (data[start : start + 10_000], 0) for start in range(0, len(data), 10_000)}
    path = write_parquet(tmp_path / "f.parquet", table(images), row_group_size=50)
    before = pa.total_allocated_bytes()
    used = [len(item.read()) + pa.total_allocated_bytes() - before for item in open_parquet(path).samples]
    assert len(used) == 1000
    assert max(used) < 5_000_000


@pytest.mark.parametrize("paths", [["a", "b", "a"], ["a", "b", None], ["a", "b", ""], [None] * 3])
def test_rows_without_a_path_of_their_own_have_a_number(paths: list[str | None], tmp_path: Path) -> None:
    """For the whole data set: the same image must not change its key with its neighbors'."""
    image = structs([{"bytes": b"x", "path": path} for path in paths])
    for name in ("a/x.parquet", "b/x.parquet"):
        (tmp_path / "set").mkdir(exist_ok=True)
        made = pa.table({"image": image, "label": [0, 1, 2]})
        write_parquet(tmp_path / "set" / name, made)
    keys = open_parquet(tmp_path / "set").keys
    assert keys == [f"{name}/x.parquet/{row}" for name in "ab" for row in range(3)]
    assert open_parquet(tmp_path / "set" / "a").keys == [f"x.parquet/{row}" for row in range(3)]


def test_other_column_names(tmp_path: Path) -> None:
    made = table(IMAGES).rename_columns(["img", "fine_label"])
    path = write_parquet(tmp_path / "f.parquet", made)
    source = open_parquet(path, image="img", label="fine_label")
    assert [item.read() for item in source.samples] == [data for data, _ in IMAGES.values()]
    with pytest.raises(
        DataError,
        match=r"f\.parquet: expected the columns 'image' and 'label', found \['img', 'fine_label'\]; set source",
    ):
        open_parquet(path)


def test_a_class_list_gives_the_metadata_other_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES))
    (tmp_path / "names").write_text("temple\nboat\nflower\n")
    source = open_parquet(path, tmp_path / "names")
    assert source.classes == ["temple", "boat", "flower"]
    assert [item.label for item in source.samples] == [2, 0, 2, 0, 2]
    (tmp_path / "names").write_text("temple\nn01440764\n")
    with pytest.raises(DataError, match=r"f\.parquet: expected classes of the class list, found 'flower'; add"):
        open_parquet(path, tmp_path / "names")


def test_parquet_without_metadata_has_numbers(tmp_path: Path) -> None:
    made = table(IMAGES).replace_schema_metadata(None)
    path = write_parquet(tmp_path / "f.parquet", made.set_column(1, "label", pa.array([0, 1, 2, 3, 1], pa.uint8())))
    assert open_parquet(path).classes == ["0", "1", "2", "3"]
    (tmp_path / "names").write_text("a\nb\nc\nd\ne\n")
    source = open_parquet(path, tmp_path / "names")
    assert (source.classes, [item.label for item in source.samples]) == (["a", "b", "c", "d", "e"], [0, 1, 2, 3, 1])
    (tmp_path / "names").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"f\.parquet: row 2: expected a class number from 0 to 1, found 2 "):
        open_parquet(path, tmp_path / "names")


LABELS = pa.array([0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": pa.array([0, 1, -1, 0, 1])},
            r"row 2: expected a class number from 0 to 1, found -1 \(an",
        ),
        ({"label": pa.array([0, 1, 0, 0, 2])}, "row 4: expected a class number from 0 to 1, found 2"),
        ({"label": pa.array([0, 1, 0, None, 0])}, "row 3: expected a class number, found null; leave the file out"),
        ({"label": pa.array(["a"] * 5)}, "label: expected integers, found string; set source.columns"),
        ({"image": pa.array(["a"] * 5)}, "image: expected images as {bytes, path} or binary, found string; set source"),
        ({"image": pa.array([{"path": "a"}] * 5)}, "image: expected images as {bytes, path} or binary, found struct<"),
    ],
)
def test_wrong_columns(changes: dict, message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES, **changes))
    with pytest.raises(DataError, match=rf"f\.parquet: {message}"):
        open_parquet(path)


@pytest.mark.parametrize("missing", [None, {"bytes": None, "path": "4.jpg"}])
def test_a_row_without_an_image(missing: dict | None, tmp_path: Path) -> None:
    rows = [{"bytes": data, "path": key} for key, (data, _) in IMAGES.items()]
    path = write_parquet(tmp_path / "f.parquet", table(IMAGES, image=structs([*rows[:4], missing])), row_group_size=2)
    with pytest.raises(DataError, match=r"f\.parquet: row 4: expected the bytes of an image, found null; write"):
        list(open_parquet(path).samples)


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", table(IMAGES).slice(0, 0))
    with pytest.raises(DataError, match=r"f\.parquet: expected rows, found none"):
        open_parquet(tmp_path / "f.parquet")


def test_files_of_different_data_sets(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "a.parquet", table(IMAGES))
    write_parquet(tmp_path / "set" / "b.parquet", table(IMAGES).replace_schema_metadata(None))
    with pytest.raises(DataError, match=r"b\.parquet: expected the class names of .*a\.parquet, found others; pack"):
        open_parquet(tmp_path / "set")


@pytest.mark.parametrize("metadata", ["[", "[]", '{"info": {"features": {"label": {"names": 3}}}}'])
def test_metadata_that_makes_no_sense(metadata: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", table(IMAGES).replace_schema_metadata({"huggingface": metadata}))
    with pytest.raises(FormatError, match=r"f\.parquet: expected the metadata that Hugging Face datasets writes"):
        open_parquet(tmp_path / "f.parquet")


def test_damaged_parquet(tables: Path, tmp_path: Path) -> None:
    path = next(iter(sorted(tables.iterdir())))
    data = path.read_bytes()
    for damaged in (b"", b"no parquet" * 100, data[: len(data) // 2], data[:-8] + b"\xff" * 8):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"\.parquet: expected a whole parquet file, found: .*; copy or download"):
            open_parquet(path)
    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])  # pages of the first image column, not the tables
    with pytest.raises(FormatError, match=r"\.parquet: expected a whole parquet file, found: .*; copy or download"):
        list(open_parquet(path).samples)


def test_checksums_of_parquet_pages_are_checked(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "f.parquet", table({"a": (b"x" * 1000, 0)}), write_page_checksum=True, compression="none"
    )
    assert [item.read() for item in open_parquet(path).samples] == [b"x" * 1000]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"xxx", b"xyx", 1))
    with pytest.raises(FormatError, match=r"f\.parquet: expected a whole parquet file, found: "):
        list(open_parquet(path).samples)


def test_columns_belong_to_parquet() -> None:
    with pytest.raises(ValidationError, match=r"columns belongs to kind: parquet \(got kind: webdataset\)"):
        SourceRecipe(kind="webdataset", path="x", columns=ColumnsRecipe())
