"""Random damage to every kind of file: a flipped bit, a lost end, a file that is gone. None of it passes in silence."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.small_runs import label_recipe, make_inputs
from helpers.small_stores import files_of

from softshard.pipeline.labels.label import label
from softshard.pipeline.runtime.errors import SoftshardError
from softshard.pipeline.store.store import open_store
from softshard.pipeline.verify import verify

SEED, TIMES = 5, 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file with its manifest, and a store with a template."""
    folder = make_inputs(tmp_path_factory.mktemp("damage"))
    assert label(label_recipe(folder, ("template", "{views: 2}"), ("views.count", "2")))
    return folder


def flip(data: bytes, random: random.Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


def truncate(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data))]


def is_noticed(path: Path) -> bool:
    try:
        return bool(verify(path).problems)
    except SoftshardError:
        return True


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize(
    "pattern",
    [
        "train.beton",
        "train.manifest.json",
        "labels.zarr/zarr.json",
        *(f"labels.zarr/{name}/c/**/*" for name in ("key", "crc32", "topk_index", "topk_gap", "tail", "block_digest")),
        *(f"labels.zarr/{name}/c/**/*" for name in ("tail_template", "template_digest")),
    ],
)
def test_damage_is_noticed(whole: Path, tmp_path: Path, pattern: str, damage: Callable) -> None:
    name = "labels.zarr" if pattern.startswith("labels") else "train.beton"
    if name == "labels.zarr":
        shutil.copytree(whole / name, tmp_path / name)
    else:
        for part in ("train.beton", "train.manifest.json"):
            shutil.copy(whole / part, tmp_path / part)
    assert not is_noticed(tmp_path / name)
    files, chance = sorted(file for file in tmp_path.glob(pattern) if file.is_file()), random.Random(SEED)
    for _ in range(TIMES):
        file = chance.choice(files)
        good = file.read_bytes()
        file.write_bytes(damage(good, chance))
        noticed = is_noticed(tmp_path / name) or means_the_same(whole / name, tmp_path / name, file)
        assert noticed, f"{file}: {damage.__name__}"
        file.write_bytes(good)


def means_the_same(whole: Path, damaged: Path, file: Path) -> bool:
    """In JSON that zarr reads, a flip may hit a character that says what would have been assumed anyway."""
    if file.name != "zarr.json":
        return False
    first, second = open_store(whole), open_store(damaged)
    same = all(
        files_of(whole)[name] == data for name, data in files_of(damaged).items() if not name.endswith("zarr.json")
    )
    return same and first.manifest == second.manifest and (first.read_template() == second.read_template()).all()
