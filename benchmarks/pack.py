"""Packing speed: this project's pack and FFCV's writer, fed as its users feed it, on the same JPEGs in the same run.

FFCV's side is a torchvision ImageFolder of PIL images and RGBImageField(write_mode="jpg"), which encodes each image
anew. The two sides alternate; the table shows medians of the rounds and the median of their ratios, for wall time and
for CPU time with that of child processes. `--json PATH` writes the figures.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from loader import write_photographs
from torchvision.datasets import ImageFolder

from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe


def cpu_seconds() -> float:
    """Of this process and of its finished children: FFCV's writers are processes, ours are threads."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(side: Callable[[], object], count: int, outputs: Path) -> tuple[float, float]:
    """(wall, CPU) seconds per image of one pass, which finds no file of the one before to replace."""
    for path in outputs.glob("*.beton"):
        path.unlink()
    wall, cpu = time.perf_counter(), cpu_seconds()
    side()
    return (time.perf_counter() - wall) / count, (cpu_seconds() - cpu) / count


def sides(images: Path, folder: Path, workers: int) -> dict[str, Callable[[], object]]:
    source = SourceRecipe(kind="imagefolder", path=str(images))
    recipe = PackRecipe(source=source, output=str(folder / "ours.beton"))

    def stock() -> None:
        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        writer = DatasetWriter(str(folder / "stock.beton"), fields, num_workers=workers)
        writer.from_indexed_dataset(ImageFolder(str(images)))

    return {"softshard": lambda: pack(recipe), "FFCV's writer": stock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # pack takes a thread for each core that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.workers])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "images", options.images)
        both = sides(folder / "images", folder, options.workers)
        for side in both.values():
            side()  # the files are in the system's cache, the libraries loaded
        rounds = [
            {name: measure(side, options.images, folder) for name, side in both.items()} for _ in range(options.rounds)
        ]
    results = {}
    for index, clock in enumerate(("wall", "cpu")):
        for name in both:
            results[f"{name}, images/s ({clock})"] = 1 / statistics.median(figures[name][index] for figures in rounds)
        ratios = [figures["FFCV's writer"][index] / figures["softshard"][index] for figures in rounds]
        results[f"times as fast ({clock})"] = statistics.median(ratios)
    for name, value in results.items():
        print(f"{name:34} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
