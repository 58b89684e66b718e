"""How good students are on labeled rows in one view, over all processes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from numpy.typing import NDArray
from torch import Tensor, nn

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.runtime.launch import make_accelerator
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.loop.checks import check_device
from softshard.trainer.recipe import TrainRecipe


class Scores(NamedTuple):
    """top1 and top5 in percent of the images; loss: the mean cross-entropy, in nats."""

    top1: float
    top5: float
    loss: float


def train_accelerator(recipe: TrainRecipe, stage: str, **options: Any) -> Accelerator:
    """The Accelerator of a train recipe, whose students are evaluated in the precision that they train in.

    Args:
        recipe: Says precision and accumulation.
        stage: For the start-up line: train, evaluate.
        **options: Accelerate's own.

    Raises:
        RecipeError: The recipe asks of a device what that cannot do.
    """
    check_device(recipe)
    mixed = {"float32": "no"}.get(recipe.precision, recipe.precision)
    accumulation = GradientAccumulationPlugin(recipe.accumulation)  # a number alone yields to the environment's
    return make_accelerator(
        stage, recipe.precision, mixed_precision=mixed, gradient_accumulation_plugin=accumulation, **options
    )


def validation_loader(recipe: TrainRecipe, beton: Beton, accelerator: Accelerator) -> ViewLoader:
    """A loader of center views, in batches as large as a part of a training batch."""
    data = recipe.data
    batch_size = max(1, recipe.batch_size // (accelerator.num_processes * recipe.accumulation))
    return ViewLoader(beton, None, data.size, batch_size, data.workers, accelerator.device, data.crop_pct)


def score(
    accelerator: Accelerator,
    students: Mapping[str, nn.Module],
    loader: ViewLoader,
    rows: NDArray[np.int64],
    targets: NDArray[np.int64],
    view: int = CENTER,
) -> dict[str, Scores]:
    """Scores of each student on rows in a view, which are decoded once for all of them.

    Args:
        accelerator: Every process takes its slice of the rows.
        students: By name.
        loader: Of the rows' images.
        rows: int64 [N].
        targets: int64 [N], the class of each row.
        view: In which the rows are rendered.

    Returns:
        Scores over all rows, in all processes.
    """
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    sums, _ = measure(accelerator, students, loader, rows[mine], targets[mine], view)
    total: Any = accelerator.reduce(sums)
    means = (total.cpu().double() / len(rows)).tolist()
    return {name: scores_of(mean) for name, mean in zip(students, means, strict=True)}


@torch.inference_mode()
def measure(
    accelerator: Accelerator,
    students: Mapping[str, nn.Module],
    loader: ViewLoader,
    rows: NDArray[np.int64],
    targets: NDArray[np.int64],
    view: int,
) -> tuple[Tensor, Tensor]:
    """What `score` does, of this process's rows alone.

    Returns:
        For each student the sums of what Scores are means of, float32 [S, 3], and its predictions, int64 [S, N]; both
        on the device, which is not waited for.
    """
    for student in students.values():
        student.eval()
    sums, predictions = torch.zeros(len(students), len(Scores._fields), device=accelerator.device), []
    for batch, classes in zip(loader.render(rows, view), _parts(targets, loader.batch_size), strict=True):
        classes = classes.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = [student(batch.images).float() for student in students.values()]
        sums += torch.stack([_sums(part, classes) for part in logits])
        predictions.append(torch.stack([part.argmax(dim=1) for part in logits]))
    return sums, torch.cat(predictions, dim=1) if predictions else torch.empty(len(students), 0, dtype=torch.int64)


def _parts(targets: NDArray[np.int64], size: int) -> tuple[Tensor, ...]:
    return torch.from_numpy(targets).split(size) if len(targets) else ()


def scores_of(means: Sequence[float]) -> Scores:
    """Scores from means over images: how often the class is first, and among the first five, and the loss."""
    return Scores(100 * means[0], 100 * means[1], means[2])


def _sums(logits: Tensor, classes: Tensor) -> Tensor:
    """float32 [3]: how many rows have their class first, among the first five, and the sum of their losses."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
    loss = torch.nn.functional.cross_entropy(logits, classes, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss])
