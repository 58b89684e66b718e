"""The verbs of the command line as functions.

Each takes a recipe as a model, as plain data (a dict of sections), or as the path of a YAML file, and raises
SoftshardError where the command would print an error. What a verb needs is imported when it is called.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.recipes.recipe import LabelRecipe, PackRecipe, ViewRecipe
from softshard.pipeline.recipes.yaml_file import as_recipe

if TYPE_CHECKING:
    from softshard.pipeline.images.manifest import PackManifest
    from softshard.trainer.evaluate import Evaluation
    from softshard.trainer.export.manifest import Exported
    from softshard.trainer.recipe import TrainRecipe

Data = Mapping[str, Any] | str | PathLike[str]


def pack(recipe: "PackRecipe | Data") -> "PackManifest":
    """Pack an image data set into a .beton with a manifest, which is returned.

    Raises:
        RecipeError: the recipe cannot be read or does not fit its model.
        DataError, FormatError: the images are not as the recipe says, or damaged.
    """
    from softshard.pipeline.images.pack import pack

    return pack(as_recipe(PackRecipe, recipe))


def label(recipe: "LabelRecipe | Data", views: Sequence[int] | None = None) -> bool:
    """Label every block that the store does not hold yet, in this process.

    Args:
        recipe: the label recipe.
        views: label these alone; None: all.

    Returns:
        Whether the work was done to its end; False when SIGINT or SIGTERM ended it.

    Raises:
        RecipeError: the recipe cannot be read or does not fit its model.
        DataError, FormatError: store, images and teachers do not fit the recipe, or there is no room.
    """
    from softshard.pipeline.labels.label import label

    return label(as_recipe(LabelRecipe, recipe), views)


def render(
    beton: str | PathLike[str],
    views: ViewRecipe | Mapping[str, Any],
    rows: Sequence[int],
    numbers: Sequence[int],
    size: int,
) -> NDArray[np.uint8]:
    """Render views of images, bit for bit as teacher and student see them.

    Args:
        beton: the packed images.
        views: the `views` section of a label recipe.
        rows: which images, by their row in the .beton.
        numbers: which views of each of them.
        size: pixels of a view's side.

    Returns:
        uint8 [len(rows), len(numbers), size, size, 3], RGB.

    Raises:
        RecipeError: the views do not fit their model.
        DataError, FormatError: the .beton is missing, damaged, or was changed.
    """
    import torch

    from softshard.pipeline.images.beton import open_beton
    from softshard.pipeline.views.loader import ViewLoader

    recipe = as_recipe(ViewRecipe, views)
    loader = ViewLoader(open_beton(Path(beton)), recipe, size, len(rows), workers=1, device=torch.device("cpu"))
    batches = loader.render(np.array(rows), np.tile(np.array(numbers), (len(rows), 1)))
    # copied, since the loader writes to its memory again
    [pixels] = [batch.images.movedim(2, -1).numpy().copy() for batch in batches]
    return pixels


def train(recipe: "TrainRecipe | Data") -> bool:
    """Train a student to the end of its schedule, from the run folder's newest checkpoint on, in this process.

    Returns:
        Whether it was trained to the end; False when SIGINT or SIGTERM ended it.

    Raises:
        RecipeError: the recipe cannot be read, does not fit its model, or asks for what does not work here.
        DataError, FormatError: data, labels and run folder do not fit together, or the loss is not finite.
    """
    from softshard.trainer.loop.train import train
    from softshard.trainer.recipe import TrainRecipe

    return train(as_recipe(TrainRecipe, recipe))


def evaluate(recipe: "TrainRecipe | Data", weights: str | PathLike[str]) -> "Evaluation":
    """Evaluate a run's weights (.safetensors) or an exported folder on the validation set of a train recipe.

    Raises:
        RecipeError: the recipe cannot be read or does not fit its model.
        DataError, FormatError: the weights or the images cannot be read, or do not fit.
    """
    from softshard.trainer.evaluate import evaluate
    from softshard.trainer.recipe import TrainRecipe

    return evaluate(as_recipe(TrainRecipe, recipe), Path(weights))


def export(
    run: str | PathLike[str], out: str | PathLike[str], formats: Sequence[str] = (), best: bool = False
) -> "Exported":
    """Fold the student of a finished run and write it to a new folder, evaluated, with a model card.

    Args:
        run: the run folder.
        out: the folder to make.
        formats: what to write beside the folded weights: onnx, int8, executorch, coreml.
        best: export the weights of the best validation, not those of the end.

    Raises:
        RecipeError: a format is unknown.
        DataError, FormatError: the run is not finished or damaged, `out` exists, or a package is missing.
    """
    from softshard.trainer.export.export import export

    return export(Path(run), Path(out), formats, best)
