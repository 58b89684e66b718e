"""Files and folders appear whole or not at all, and leave nothing beside them."""

from pathlib import Path

import pytest

from softshard.pipeline.runtime.files import atomic_path, write_atomically


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("new")


def make_file(path: Path) -> None:
    path.write_text("new")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_what_is_written_appears_when_it_is_whole(tmp_path: Path, make) -> None:
    path = tmp_path / "not" / "there" / "yet"
    with atomic_path(path) as partial:
        make(partial)
        assert partial.parent == path.parent
        assert not path.exists()
    assert (path / "inside" if path.is_dir() else path).read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("make", [make_file, make_folder, lambda path: None])
def test_what_fails_leaves_nothing(tmp_path: Path, make) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "name") as partial:
            make(partial)
            raise RuntimeError("it fails")

    with pytest.raises(RuntimeError, match="it fails"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "file", b"new")
    with atomic_path(tmp_path / "folder") as partial:
        make_folder(partial)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "new"


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_folder_in_use_stays(tmp_path: Path, make) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def write() -> None:
        with atomic_path(tmp_path / "folder") as partial:
            make(partial)

    with pytest.raises(OSError, match="folder"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
