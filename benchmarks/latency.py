"""What folding buys: latency of students with and without their branches, in eager torch, ONNX and int8, one thread.

The students have their initial weights, and int8 is calibrated on the photographs that scikit-learn ships. All sides of
a student take turns; the table shows parameters, MACs, median and 90th percentile of the milliseconds for an image, and
the medians of the ratios, beside the goals. `--json PATH` writes the figures, `--plot PATH` latency against MACs.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from softshard.trainer.export.formats import FORMATS
from softshard.trainer.export.formats.contract import InputSpec, Job
from softshard.trainer.export.latency import (
    Form,
    Side,
    measure,
    plot,
    ratios,
    save_json,
    sides_of,
    table,
    unfolded_network,
)
from softshard.trainer.recipe import ExpandRecipe, StudentRecipe
from softshard.trainer.students import fold
from softshard.trainer.students.build import Library
from softshard.trainer.students.trace import Kind

STUDENTS: dict[str, Library] = {
    "mobilenetv2_100": "timm",
    "ghostnetv3_100": "timm",
    "shufflenet_v2_x1_0": "torchvision",
}
GOALS = {("mobilenetv2_100", "onnx, folded against unfolded"): 3.0} | {
    (name, "int8 against onnx"): 1.0 for name in STUDENTS
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, BATCHES, BATCH_SIZE = 1000, 4, 8


def photographs(pixels: InputSpec) -> list[Tensor]:
    """Batches of squares cut at random from the two photographs, normalized."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(BATCHES):
        images = []
        for number in range(BATCH_SIZE):
            photograph = Image.fromarray(load_sample_images().images[number % 2])
            side = int(rng.integers(200, 428))
            left, top = (int(rng.integers(0, limit - side + 1)) for limit in photograph.size)
            square = photograph.resize((pixels.size, pixels.size), box=(left, top, left + side, top + side))
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        batches.append(pixels.normalize(torch.stack(images)))
    return batches


def sides(name: str, kinds: tuple[Kind, ...], pixels: InputSpec, folder: Path) -> list[Side]:
    student = StudentRecipe(
        model=name, library=STUDENTS[name], num_classes=CLASSES, expand=ExpandRecipe(branches=3, conv_types=kinds)
    )
    unfolded = unfolded_network(student, pixels.size)
    result = []
    forms: list[tuple[Form, nn.Module, tuple[str, ...]]] = [
        ("unfolded", unfolded, ("onnx",)),
        ("folded", fold(unfolded), ("onnx", "int8")),
    ]
    for form, network, formats in forms:
        job = Job(network, name, pixels, (), lambda: photographs(pixels))
        files = {}
        for wanted in formats:
            files[wanted] = folder / name / form / FORMATS[wanted].file
            files[wanted].parent.mkdir(parents=True, exist_ok=True)
            FORMATS[wanted].write(job, files[wanted])
        result += sides_of(name, form, network, pixels.size, files)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", default=",".join(STUDENTS), help="comma-separated")
    parser.add_argument("--kinds", default="depthwise,pointwise", help="of convolutions that get branches")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    pixels = InputSpec(size=options.size, crop_pct=0.875, mean=MEAN, std=STD)
    latencies = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.students.split(","):
            latencies += measure(
                sides(name, tuple(options.kinds.split(",")), pixels, Path(folder)), options.size, options.rounds
            )
    print(table(latencies))
    for name, what, times in ratios(latencies):
        if (name, what) in GOALS:
            print(f"goal, {name}: {what}: at least {GOALS[name, what]:.1f}, found {times:.2f}")
    if options.json:
        save_json(latencies, options.json)
    if options.plot:
        plot(latencies, options.plot)


if __name__ == "__main__":
    main()
