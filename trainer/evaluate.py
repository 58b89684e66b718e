"""How good a run's weights or an exported folder are on the validation set."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from softshard.pipeline.views.geometry import CENTER
from softshard.trainer.data.training_set import open_validation_set
from softshard.trainer.export.formats.folder import load_folder
from softshard.trainer.loop.scores import Scores, measure, scores_of, train_accelerator, validation_loader
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import Student, make_student


class Evaluation(NamedTuple):
    """`scores` on a validation set of so many images; predictions: the predicted class of each."""

    scores: Scores
    images: int
    parameters: int
    predictions: list[int]


def evaluate(recipe: TrainRecipe, weights: Path) -> Evaluation:
    """Score weights on the validation set of a recipe.

    Args:
        recipe: Names the set, and the student of a run's weights.
        weights: A run's weights (.safetensors, of the student as trained), or an exported folder, which is read
            through stock timm or torchvision.

    Raises:
        RecipeError: An unknown model.
        DataError, FormatError: Images or weights that do not fit or cannot be read.
    """
    accelerator = train_accelerator(recipe, "evaluate")
    beton = open_validation_set(recipe)
    student = Student(load_folder(weights)) if weights.is_dir() else make_student(recipe, weights)
    students = {"student": student.to(accelerator.device)}
    loader, rows = validation_loader(recipe, beton, accelerator), np.arange(len(beton))
    [sums], [predictions] = measure(accelerator, students, loader, rows, beton.labels, CENTER)
    means = (sums.cpu().double() / len(beton)).tolist()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return Evaluation(scores_of(means), len(beton), parameters, predictions.tolist())
