"""Rendering speed: crop and flip by this project's decoder and by stock FFCV's, on the same file in the same run.

The two sides alternate; the table shows medians of the rounds and the median of their ratios, for wall time and for
process CPU time. `--json PATH` writes the figures.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.beton import open_beton
from pipeline.loader import ViewLoader
from pipeline.pack import pack
from pipeline.recipe import PackRecipe, SourceRecipe, ViewRecipe

SIZE, BATCH = 224, 64


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


def measure(epoch: Callable[[], int]) -> tuple[float, float]:
    """(wall, process CPU) seconds per image of one pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = epoch()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def sides(beton_path: Path, workers: int) -> dict[str, Callable[[], int]]:
    beton = open_beton(beton_path)
    ours = ViewLoader(beton, ViewRecipe(seed=0, count=1), SIZE, BATCH, workers, torch.device("cpu"))
    pipeline = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    stock = Loader(
        str(beton_path),
        BATCH,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": pipeline, "label": None},  # pyright: ignore[reportArgumentType]
    )
    rows = np.arange(len(beton))
    return {
        "softshard": lambda: sum(len(batch.rows) for batch in ours.render(rows, 0)),
        "stock FFCV": lambda: sum(len(images) for (images,) in stock),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", options.images)
        source = SourceRecipe(kind="imagefolder", path=str(folder / "images"))
        pack(PackRecipe(source=source, output=str(folder / "images.beton")))
        epochs = sides(folder / "images.beton", options.workers)
        for epoch in epochs.values():
            epoch()  # compile
        rounds = [{name: measure(epoch) for name, epoch in epochs.items()} for _ in range(options.rounds)]
    results = {}
    for index, clock in enumerate(("wall", "cpu")):
        for name in epochs:
            results[f"{name}, images/s ({clock})"] = 1 / statistics.median(figures[name][index] for figures in rounds)
        ratios = [figures["stock FFCV"][index] / figures["softshard"][index] for figures in rounds]
        results[f"times as fast ({clock})"] = statistics.median(ratios)
    for name, value in results.items():
        print(f"{name:32} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
