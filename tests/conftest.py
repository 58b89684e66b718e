"""Inputs for all tests: real photographs and digits in class folders, the same packed, the CPU."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.small_packs import pack_folder
from helpers.small_runs import label_recipe, make_inputs, mnist_data
from helpers.small_sources import images_of, sample, table, write_tar
from PIL import Image
from sklearn.datasets import load_sample_images

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.labels.label import label

SIZES = [(427, 640), (200, 300), (161, 160), (64, 48), (33, 97), (17, 301), (301, 17), (8, 8), (2, 3), (1, 1)]
LONGEST = ("test_configs.py", "test_kills.py", "test_kills_in_training.py", "test_processes.py", "test_train.py")
LONGEST += ("test_gpu_check.py", "test_gpu_stages.py")
ENCODINGS = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2, "progressive": True}]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, beside which the others fit; leave out what needs an accelerator where
    there is none."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("there is no accelerator"))


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as those of tests gain nothing from threads, which wait for each other for long on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Two photographs of 427 x 640 pixels, a temple and a flower."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[Image.Image]) -> Path:
    """Crops of the photographs in many sizes: classes `flower` and `temple`, baseline, progressive and gray JPEGs."""
    root = tmp_path_factory.mktemp("photos")
    for photograph, name in zip(photographs, ("temple", "flower"), strict=True):
        (root / name).mkdir()
        for number, (height, width) in enumerate(SIZES):
            crop = photograph.crop((0, 0, width, height))
            options = ENCODINGS[number % len(ENCODINGS)]
            crop.save(root / name / f"{height}x{width}.jpg", quality=90, **options)
        photograph.crop((100, 50, 300, 240)).convert("L").save(root / name / "gray.JPEG")
    return root


@pytest.fixture(scope="session")
def photos(photo_folder: Path) -> Beton:
    return pack_folder(photo_folder)[1]


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 digits of 28 x 28 pixels as gray JPEGs, classes 0 to 9."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    for number in range(0, len(images), 25):
        folder = root / str(labels[number])
        folder.mkdir(exist_ok=True)
        Image.fromarray(images[number].reshape(28, 28).astype(np.uint8)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def digits(digit_folder: Path) -> Beton:
    return pack_folder(digit_folder)[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """What training needs: packed digits, and a store of a small teacher's labels for them."""
    folder = make_inputs(tmp_path_factory.mktemp(request.module.__name__))
    assert label(label_recipe(folder))
    return folder


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


@pytest.fixture
def shards(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in three tars."""
    images = list(images_of(photo_folder).items())
    for number in range(3):
        members = [part for key, (data, label) in images[number::3] for part in sample(key, data, label)]
        write_tar(tmp_path / "tars" / f"set-{number:04}.tar", members)
    return tmp_path / "tars"


@pytest.fixture
def tables(photo_folder: Path, tmp_path: Path) -> Path:
    """The photographs in two parquet files with several row groups each."""
    images = list(images_of(photo_folder).items())
    (tmp_path / "tables").mkdir()
    for number in range(2):
        part = dict(images[number * 11 : (number + 1) * 11])
        pq.write_table(table(part), tmp_path / "tables" / f"train-0000{number}-of-00002.parquet", row_group_size=3)
    return tmp_path / "tables"
