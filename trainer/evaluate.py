"""Predictions of a student on the centre view of a packed validation set."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pipeline.beton import Beton
from pipeline.launch import make_accelerator
from pipeline.loader import ViewLoader
from pipeline.views.geometry import CENTRE
from trainer.data import open_validation_set
from trainer.formats.contract import Predictor
from trainer.formats.folder import load_folder
from trainer.recipe import TrainRecipe
from trainer.student import Student, make_student


def validation_loader(recipe: TrainRecipe, beton: Beton, accelerator: Accelerator) -> ViewLoader:
    data, batch_size = recipe.data, max(1, recipe.batch_size // accelerator.num_processes)
    return ViewLoader(beton, None, data.size, batch_size, data.workers, accelerator.device, data.crop_pct)


@torch.inference_mode()
def predict(accelerator: Accelerator, student: Student, loader: ViewLoader, rows: NDArray[np.int64]) -> Tensor:
    """Predicted classes of the rows, int64 [N], on the CPU."""
    student.eval()
    classes = []
    for batch in loader.render(rows, CENTRE):
        with accelerator.autocast():
            logits = student(batch.images)
        classes.append(logits.argmax(dim=1).cpu())
    return torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64)


def top1(accelerator: Accelerator, student: Student, loader: ViewLoader, beton: Beton) -> float:
    """Percentage of rows whose predicted class is their hard label; every process takes a share of the rows."""
    rows = np.arange(accelerator.process_index, len(beton), accelerator.num_processes)
    right = predict(accelerator, student, loader, rows) == torch.from_numpy(beton.labels[rows])
    total = accelerator.reduce(right.sum().to(accelerator.device))
    return 100 * int(total) / len(beton)  # pyright: ignore[reportArgumentType]


class Evaluation(NamedTuple):
    """top1 in percent; predictions: the predicted class of each row of the validation set."""

    top1: float
    images: int
    parameters: int
    predictions: list[int]


def evaluate(recipe: TrainRecipe, weights: Path) -> Evaluation:
    """Evaluate a run's weights (.safetensors, of the student as trained) or an exported folder (through stock timm or
    torchvision)."""
    accelerator = make_accelerator("evaluate")
    beton = open_validation_set(recipe)
    student = Student(load_folder(weights)) if weights.is_dir() else make_student(recipe, weights)
    loader = validation_loader(recipe, beton, accelerator)
    predicted = predict(accelerator, student.to(accelerator.device), loader, np.arange(len(beton)))
    right = int((predicted == torch.from_numpy(beton.labels)).sum())
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return Evaluation(100 * right / len(beton), len(beton), parameters, predicted.tolist())


class Comparison(NamedTuple):
    """top1, and agreement of predictions with those of a reference, in percent; the largest difference from its logits,
    relative to the largest of them."""

    top1: float
    agreement: float
    difference: float


@torch.inference_mode()
def compare(
    reference: Predictor, others: Mapping[str, Predictor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Comparison]:
    """Each of `others` against the reference, in one pass over batches of normalised images, float32 [N, 3, S, S], and
    hard labels, int64 [N]."""
    images, largest = 0, torch.zeros(())
    right, same = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
    difference = dict.fromkeys(others, torch.zeros(()))  # torch's maximum keeps a nan
    for pixels, labels in batches:
        expected = reference(pixels)
        images, largest = images + len(labels), torch.maximum(largest, expected.abs().max())
        for name, predictor in others.items():
            found = predictor(pixels)
            predicted = found.argmax(dim=1)
            right[name] += int((predicted == labels).sum())
            same[name] += int((predicted == expected.argmax(dim=1)).sum())
            difference[name] = torch.maximum(difference[name], (found - expected).abs().max())
    return {
        name: Comparison(100 * right[name] / images, 100 * same[name] / images, float(difference[name] / largest))
        for name in others
    }
