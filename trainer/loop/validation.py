"""What a run is validated on: the center view of the validation set, and the teacher's labels of some views."""

from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.views.kernels.rng import stream_states
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.data.soft_labels import teacher_classes
from softshard.trainer.data.training_set import TrainingSet, open_validation_set
from softshard.trainer.loop.scores import score, validation_loader
from softshard.trainer.loop.train_state import TrainState
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import Student
from softshard.trainer.students import fold

AGREEMENT_SALT, AGREEMENT_VIEW = np.uint64(0x6167726565), 0


@dataclass(frozen=True)
class Validation:
    """What students are scored on.

    Attributes:
        accelerator: All processes take part.
        beton: The validation set.
        loader: Of its center views.
        training_loader: Of the training set's views.
        rows: int64 [A], training images, the same for every run on this set. Empty without soft labels.
        taught: int64 [A], what the teacher finds most probable in a view of each.
    """

    accelerator: Accelerator
    beton: Beton
    loader: ViewLoader
    training_loader: ViewLoader
    rows: NDArray[np.int64]
    taught: NDArray[np.int64]

    def figures(self, state: TrainState, folded: bool) -> dict[str, float]:
        """Score the students of a train state.

        Args:
            state: Its weights, and their average where the recipe asks for one.
            folded: Score the result without its branches, too.

        Returns:
            top1, top5 and agreement in percent, validation_loss in nats; with the prefix `ema_` those of the average,
            with `folded_` those of the folded result.
        """
        state.broadcast_statistics()
        students = {"ema_" if name == "ema" else "": student for name, student in state.students.items()}
        if folded and state.recipe.student.expand:
            students["folded_"] = Student(fold(state.result.network)).to(self.accelerator.device)
        everything = np.arange(len(self.beton))
        scores = score(self.accelerator, students, self.loader, everything, self.beton.labels)
        figures = {}
        for prefix, found in scores.items():
            figures |= {
                f"{prefix}top1": found.top1,
                f"{prefix}top5": found.top5,
                f"{prefix}validation_loss": found.loss,
            }
        if len(self.rows):
            loader, rows, taught = self.training_loader, self.rows, self.taught
            scores = score(self.accelerator, students, loader, rows, taught, AGREEMENT_VIEW)
            figures |= {f"{prefix}agreement": found.top1 for prefix, found in scores.items()}
        return figures


def open_validation(
    accelerator: Accelerator, recipe: TrainRecipe, training: TrainingSet, training_loader: ViewLoader
) -> Validation:
    """Open the validation set, and read the teacher's classes for the agreement.

    Raises:
        DataError, FormatError: A set or the labels cannot be read.
    """
    beton = open_validation_set(recipe)
    loader = validation_loader(recipe, beton, accelerator)
    rows = taught = np.empty(0, np.int64)
    if training.stores and recipe.evaluation.agreement:
        words = stream_states(AGREEMENT_SALT, training.beton.keys[training.rows], 0)
        rows = training.rows[np.argsort(words, kind="stable")[: recipe.evaluation.agreement]]
        taught = teacher_classes(training.stores, AGREEMENT_VIEW, rows)
    return Validation(accelerator, beton, loader, training_loader, rows, taught)
