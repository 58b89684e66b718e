"""Verifying: whole files are whole, and each kind of damage is one line that says where it is."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.small_packs import edit, edit_manifest, jpeg
from helpers.small_stores import create, fill, make_manifest

from softshard.pipeline.__main__ import main
from softshard.pipeline.images.beton import Beton, manifest_path, open_beton
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.store import Store
from softshard.pipeline.verify import verify


def flip(path: Path, position: int) -> None:
    data = path.read_bytes()
    edit(path, position, bytes([data[position] ^ 0x10]))


def trust(path: Path) -> None:
    """Make the manifest's checksums fit the bytes that are in the file now."""
    beton = open_beton(path)
    edit_manifest(path, crc32=[zlib.crc32(jpeg(beton, row)) for row in range(len(beton))])


# Packed files


def test_a_whole_file(photos: Beton, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(photos.path).problems == []
    assert main(["verify", str(photos.path)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{photos.path}: 22 images; whole\n"
    assert "verify: 100%" in err, "the progress bar"


def test_every_flipped_byte_of_an_image_is_found(packed: Path) -> None:
    beton = open_beton(packed)
    start, length = int(beton.offsets[2]), int(beton.lengths[2])
    for position in range(start, start + length, max(1, length // 25)):
        flip(packed, position)
        [problem] = verify(packed).problems
        assert problem.startswith("b/0.jpg: expected CRC-32 ")
        flip(packed, position)
    assert verify(packed).problems == []


def test_every_damaged_image_has_a_line(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beton = open_beton(packed)
    for row in (3, 0):
        flip(packed, int(beton.offsets[row]) + 100)
    assert main(["verify", str(packed)]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"a/0.jpg: expected CRC-32 {int(beton.crc32[0]):08x}, found ")
    assert second.startswith("b/1.jpg: expected CRC-32 ")
    assert last == f"{packed}: 4 images; 2 not whole"


def test_images_that_never_decoded(packed: Path) -> None:
    """Their checksums are right: something else wrote such a file."""
    beton = open_beton(packed)
    start, length = int(beton.offsets[1]), int(beton.lengths[1])
    edit(packed, start + length // 2, bytes(length - length // 2))
    trust(packed)
    [problem] = verify(packed).problems
    assert problem == "a/1.jpg: expected a JPEG of 91 x 70 pixels, found one that does not decode; pack again"


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_damaged_tables_are_one_line(position: int, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if position == 5000:
        packed.write_bytes(packed.read_bytes()[:-1])
    else:
        flip(packed, position % packed.stat().st_size)
    assert main(["verify", str(packed)]) == 1
    problem, last = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{packed}: expected ")
    assert last == f"{packed}: the rest was not checked; 1 not whole"


def test_a_damaged_manifest(packed: Path) -> None:
    fields = json.loads(manifest_path(packed).read_text())
    manifest_path(packed).write_text(json.dumps(fields | {"converted": {"png": 0}}))
    [problem] = verify(packed).problems
    assert "expected a manifest of version 1, found problems: converted.png: " in problem


def test_nothing_to_verify(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest_path(packed).unlink()
    with pytest.raises(DataError, match=r"images\.manifest\.json: expected the manifest of the \.beton beside it"):
        verify(packed)
    assert main(["verify", str(packed)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {manifest_path(packed)}: expected the manifest")
    for verb in ("verify", "show"):
        assert main([verb, str(packed.parent / "none.zarr")]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"error: {packed.parent}/none.zarr: expected a .beton, a store or shards, found nothing there; "
            "check the path\n"
        )


def test_a_disk_that_fails_is_a_line(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    problems = verify(packed).problems
    assert problems[0] == "a/0.jpg: expected to read it, found: Input/output error; copy the file again"
    assert len(problems) == 5, "each image, and the padding"


def test_the_command_line(packed: Path) -> None:
    flip(packed, int(open_beton(packed).offsets[0]))
    command = [sys.executable, "-m", "softshard.pipeline", "verify", packed.name]
    done = subprocess.run(command, cwd=packed.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("a/0.jpg: expected CRC-32 ")
    assert "Traceback" not in done.stderr


# Stores


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two views of three blocks each."""
    store = create(tmp_path / "labels.zarr", make_manifest())
    fill(store)
    return store


def chunk(store: Store, name: str, *position: int) -> Path:
    return Path(store.name).joinpath(name, "c", *map(str, position))


def test_a_whole_store(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(Path(store.name))]) == 0
    assert capsys.readouterr().out == f"{Path(store.name)}: 6 of 6 blocks labeled; whole\n"


def test_blocks_without_labels_are_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = create(tmp_path / "labels.zarr", make_manifest())
    fill(store, [(1, 2), (0, 0)])
    assert main(["verify", str(Path(store.name))]) == 0
    assert capsys.readouterr().out == f"{Path(store.name)}: 2 of 6 blocks labeled; whole\n"


def test_every_damaged_block_has_a_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    flip(chunk(store, "topk_index", 0, 1, 0), 20)
    chunk(store, "tail", 1, 0).unlink()
    flip(chunk(store, "block_digest", 1, 2), 0)
    flip(chunk(store, "topk_gap", 1, 2, 0), 20)
    assert main(["verify", str(Path(store.name))]) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    places = [problem.partition(": expected ")[0].removeprefix(f"{Path(store.name)}: ") for problem in problems]
    assert [place[: len("view 0, block 1")] for place in places] == [
        "view 0, block 1",
        "view 1, block 0",
        "view 1, block 2",
    ]
    assert last == f"{Path(store.name)}: 6 of 6 blocks labeled; 3 not whole"


def test_exchanged_blocks_are_found(store: Store) -> None:
    first, second = (chunk(store, "tail", view, 0) for view in (0, 1))
    assert first.read_bytes() != second.read_bytes()
    first.write_bytes(second.read_bytes())
    [problem] = verify(Path(store.name)).problems
    assert "view 0, block 0: expected content with digest" in problem


def test_a_damaged_key_column(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    flip(chunk(store, "key", 0), 30)
    assert main(["verify", str(Path(store.name))]) == 1
    assert "the rest was not checked; 1 not whole" in capsys.readouterr().out


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    [problem] = verify(tmp_path / "empty").problems
    assert "expected a store of labels" in problem


def test_random_damage_of_a_store_is_never_missed(store: Store) -> None:
    rng = np.random.default_rng(0)
    files = sorted(
        file for name in ("topk_index", "topk_gap", "tail") for file in (Path(store.name) / name).rglob("*/*/*")
    )
    for file in files:
        if file.is_file() and file.name != "zarr.json":
            position = int(rng.integers(file.stat().st_size))
            flip(file, position)
            assert len(verify(Path(store.name)).problems) == 1, f"{file}, byte {position}"
            flip(file, position)
    assert verify(Path(store.name)).problems == []
