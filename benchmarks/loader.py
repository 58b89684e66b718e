"""Rendering speed against what people use instead, on the same photographs in the same run.

Views of 224 pixels from JPEGs of about 500 x 375, all from the system's cache, as uint8 batches: stock FFCV on the same
packed file, torchvision and timm in a DataLoader on the class folder, and views that share a decode against views that
do not. timm's erasing works on normalized floats, so that its batches are float32. Every pair has the same images,
batch size and number of workers (threads here and in FFCV, processes that live on in a DataLoader). The two sides of a
pair take turns; CPU time is that of the process and its workers. The table shows medians of the rounds, and medians of
the ratios within a round. `--json PATH` writes the figures.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import (
    PackRecipe,
    RandAugmentRecipe,
    RandomErasingRecipe,
    SourceRecipe,
    ViewRecipe,
)
from softshard.pipeline.views.loader import ViewLoader

SIZE, BATCH = 224, 64
SHARING, SHARING_BATCH = 16, 16  # views of each image, images in a batch of them
CROP = ViewRecipe(seed=0, count=SHARING)
AUGMENT = ViewRecipe(
    seed=0, count=1, rand_augment=RandAugmentRecipe(), random_erasing=RandomErasingRecipe(probability=0.25)
)
Pass = Callable[[], int]  # renders all views and says how many they were


class Pair(NamedTuple):
    name: str
    ours: Pass
    peer: Pass
    goal: float


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of about 500 x 375 pixels, cut at different places from the two photographs that scikit-learn ships."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        photograph = photographs[number % 2]
        width, height = int(rng.integers(470, 531)), int(rng.integers(350, 401))
        rest = (photograph.width - width, photograph.height - height)
        left, top = (int(rng.integers(0, limit + 1)) for limit in rest)
        image = photograph.crop((left, top, left + width, top + height))
        image.save(folder / "all" / f"{number:04}.jpg", quality=90)


def pairs(images: Path, beton: Beton, workers: int) -> Iterator[Pair]:
    rows = np.arange(len(beton))
    crop, augment = (views_of(beton, views, BATCH, workers, rows) for views in (CROP, AUGMENT))
    yield Pair("crop, flip / stock FFCV", crop, stock_ffcv(beton, workers), 1.25)
    yield Pair("crop, flip / torchvision on Pillow", crop, torchvision_pillow(images, workers), 2.5)
    yield Pair("crop, flip / torchvision on tensors", crop, torchvision_tensors(images, workers), 1.6)
    yield Pair("RandAugment, erasing / timm", augment, timm_augment(images, workers), 3.0)
    yield sharing(beton, workers, rows[:: SHARING // 2])


def views_of(beton: Beton, views: ViewRecipe, batch: int, workers: int, rows: np.ndarray) -> Pass:
    loader = ViewLoader(beton, views, SIZE, batch, workers, torch.device("cpu"))
    return lambda: sum(len(batch.rows) for batch in loader.render(rows, 0))


def sharing(beton: Beton, workers: int, rows: np.ndarray) -> Pair:
    """Views of an eighth of the images: each is decoded once for all, or once for each."""
    loader = ViewLoader(beton, CROP, SIZE, SHARING_BATCH, workers, torch.device("cpu"))
    numbers = np.tile(np.arange(SHARING), (len(rows), 1))
    return Pair(
        f"{SHARING} views of a decode / of one each",
        lambda: sum(batch.images.shape[0] * batch.images.shape[1] for batch in loader.render(rows, numbers)),
        lambda: sum(len(batch.rows) for view in range(SHARING) for batch in loader.render(rows, view)),
        2.0,
    )


def stock_ffcv(beton: Beton, workers: int) -> Pass:
    pipeline = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(beton.path),
        BATCH,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": pipeline, "label": None},  # pyright: ignore[reportArgumentType]
    )
    return lambda: sum(len(images) for (images,) in loader)


def torchvision_pillow(images: Path, workers: int) -> Pass:
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    return data_loader(images, workers, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))


def torchvision_tensors(images: Path, workers: int) -> Pass:
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    return data_loader(images, workers, v2.Compose([crop, v2.RandomHorizontalFlip()]), loader=read_tensor)


def read_tensor(path: str) -> torch.Tensor:
    image = decode_jpeg(read_file(path), mode=ImageReadMode.RGB)
    assert isinstance(image, torch.Tensor)
    return image


def timm_augment(images: Path, workers: int) -> Pass:
    posterize = auto_augment.NAME_TO_OP["Posterize"]  # timm asks for 0 bits at level 10, which Pillow 13 refuses
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **options: posterize(image, max(1, bits))
    transform = create_transform(
        SIZE,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bilinear",
        re_prob=0.25,
        re_mode="pixel",
    )
    return data_loader(images, workers, transform)


def data_loader(images: Path, workers: int, transform: Any, **options: Any) -> Pass:
    dataset = ImageFolder(str(images), transform, **options)
    loader: Iterable[Any] = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: sum(len(pixels) for pixels, _ in loader)


def cpu_seconds() -> float:
    """Of this process and all its children, which live on between passes."""
    process = psutil.Process()
    children = (child.cpu_times() for child in process.children(recursive=True))
    return time.process_time() + sum(times.user + times.system for times in children)


def measure(work: Pass) -> tuple[float, float]:
    """(wall, CPU) seconds a view of one pass."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    count = work()
    return (time.perf_counter() - wall) / count, (cpu_seconds() - cpu) / count


def compare(pair: Pair, rounds: int) -> dict[str, Any]:
    for work in (pair.ours, pair.peer):
        work()  # compile, start the workers, read the files
    figures = []
    for number in range(rounds):
        order = (pair.ours, pair.peer) if number % 2 == 0 else (pair.peer, pair.ours)
        measured = {work: measure(work) for work in order}
        figures.append((measured[pair.ours], measured[pair.peer]))
    speeds = {
        f"{side}, views/s": 1 / statistics.median(figure[index][0] for figure in figures)
        for index, side in enumerate(("ours", "peer"))
    }
    ratios = {
        f"times as fast ({name})": statistics.median(peer[clock] / ours[clock] for ours, peer in figures)
        for clock, name in enumerate(("wall", "cpu"))
    }
    seconds = [{"ours": ours, "peer": peer} for ours, peer in figures]
    return {"what": pair.name, **speeds, **ratios, "goal": pair.goal, "seconds a view (wall, cpu)": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    print(
        f"{'':38}{'views/s':^20}{'times as fast':^18}\n{'':38}{'ours':>10}{'peer':>10}{'wall':>9}{'CPU':>9}{'goal':>9}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", options.images)
        source = SourceRecipe(kind="imagefolder", path=str(folder / "images"))
        pack(PackRecipe(source=source, output=str(folder / "images.beton")))
        for pair in pairs(folder / "images", open_beton(folder / "images.beton"), options.workers):
            result = compare(pair, options.rounds)
            what, ours, peer, wall, cpu, goal, _ = result.values()
            print(f"{what:38}{ours:10.0f}{peer:10.0f}{wall:9.2f}{cpu:9.2f}{goal:9.2f}", flush=True)
            results.append(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
