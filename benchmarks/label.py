"""What labeling costs beyond its teacher: a labeling run against the bare teacher loop on batches that are ready.

DeiT-B with random weights on views of 224 pixels (crop, flip) from JPEGs of about 500 x 375. The run renders, labels,
encodes, digests and writes a store; the loop calls the same teacher on uint8 batches in memory. The two take turns; the
table shows medians of the rounds, and medians of the ratios within a round, for wall and for CPU time of the process.
Because a teacher's own time varies by some percent from call to call, the run's wall time is also set against the time
that it spends in its teacher.
`--template` labels 4 views of each image together. `--json PATH` writes the figures.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from loader import write_photographs

from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.images.pack import pack
from softshard.pipeline.labels.label import label_units, make_labeler, missing_units
from softshard.pipeline.labels.labeler import Labeler
from softshard.pipeline.recipes.recipe import (
    LabelRecipe,
    PackRecipe,
    SourceRecipe,
    TeacherRecipe,
    TemplateRecipe,
    ViewRecipe,
)
from softshard.pipeline.runtime.launch import StopSignal
from softshard.pipeline.store.store import create_store
from softshard.pipeline.views.loader import ViewLoader

MODEL, SIZE, CLASSES, VIEWS = "deit_base_patch16_224", 224, 1000, 4
GOAL = 1.08


def make_recipe(folder: Path, images: int, batch_size: int, template: bool, workers: int) -> LabelRecipe:
    """Photographs, packed, and a teacher's random weights."""
    write_photographs(folder / "images", images)
    names = ["all", *(f"class {number}" for number in range(1, CLASSES))]
    (folder / "classes.txt").write_text("\n".join(names))
    source = SourceRecipe(kind="imagefolder", path=str(folder / "images"))
    pack(PackRecipe(source=source, classes=str(folder / "classes.txt"), output=str(folder / "train.beton")))
    safetensors.torch.save_file(timm.create_model(MODEL).state_dict(), folder / "teacher.safetensors")
    return LabelRecipe(
        beton=str(folder / "train.beton"),
        store=str(folder / "labels.zarr"),
        classes=CLASSES,
        views=ViewRecipe(seed=0, count=VIEWS),
        teachers=(TeacherRecipe(model=MODEL, checkpoint=str(folder / "teacher.safetensors")),),
        top_k=10,
        template=TemplateRecipe(views=VIEWS) if template else None,
        block_rows=2 * batch_size,  # whole batches, as large as those of the bare loop
        batch_size=batch_size,
        workers=workers,
    )


def run(labeler: Labeler, manifest: StoreManifest) -> float:
    """Label everything into a new store; returns the wall time divided by that spent in the teacher."""
    ensemble, inside, started = labeler.ensemble, [], time.perf_counter()

    def timed(images: dict[int, torch.Tensor]) -> torch.Tensor:
        before = time.perf_counter()
        logits = ensemble(images)
        inside.append(time.perf_counter() - before)
        return logits

    labeler.ensemble = timed
    beton, location = labeler.beton, Path(labeler.recipe.store)
    shutil.rmtree(location, ignore_errors=True)
    store = create_store(location, manifest, beton.keys, beton.crc32)
    with StopSignal() as stop, ThreadPoolExecutor(1) as writer:
        units = missing_units(store, range(VIEWS))
        assert label_units(labeler, store, units, stop, lambda views, labels: None, writer)
    labeler.ensemble = ensemble
    return (time.perf_counter() - started) / sum(inside)


def ready_batches(recipe: LabelRecipe) -> list[torch.Tensor]:
    beton = open_beton(recipe.beton)
    loader = ViewLoader(beton, recipe.views, SIZE, recipe.batch_size, recipe.workers, torch.device("cpu"))
    rows = np.arange(len(beton))
    return [batch.images.clone() for view in range(VIEWS) for batch in loader.render(rows, view)]


@torch.inference_mode()
def loop(labeler: Labeler, batches: list[torch.Tensor]) -> float:
    for images in batches:
        labeler.ensemble({SIZE: images})
    return 1.0  # all of it in the teacher


def measure(side: Callable[[], float]) -> tuple[float, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = side()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="--images is a multiple of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the teacher")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--template", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.images % options.batch:
        parser.error(f"--images: expected a multiple of --batch = {options.batch}, found {options.images}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        recipe = make_recipe(Path(name), options.images, options.batch, options.template, options.workers)
        labeler, manifest = make_labeler(recipe, Accelerator(cpu=True))
        batches = ready_batches(recipe)
        sides = {"label": lambda: run(labeler, manifest), "bare teacher": lambda: loop(labeler, batches)}
        for side in sides.values():
            side()
        rounds = [{name: measure(side) for name, side in sides.items()} for _ in range(options.rounds)]
    results: dict[str, float] = {}
    for index, clock in enumerate(("wall", "cpu")):
        for name in sides:
            seconds = statistics.median(figures[name][index] for figures in rounds)
            results[f"{name}, ms a view ({clock})"] = 1000 * seconds / (options.images * VIEWS)
        ratios = [figures["label"][index] / figures["bare teacher"][index] for figures in rounds]
        results[f"ratio ({clock}), goal {GOAL} or less"] = statistics.median(ratios)
    results["label / its own teacher (wall)"] = statistics.median(figures["label"][2] for figures in rounds)
    for name, value in results.items():
        print(f"{name:34} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
