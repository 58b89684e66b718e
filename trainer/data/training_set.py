"""Which rows train, in which order, in which view, with the labels of which stores."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.manifest import array_digest, text_digest
from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.views.kernels.rng import stream_states  # pyright: ignore[reportUnknownVariableType]
from softshard.trainer.data.soft_labels import Labels, open_labels
from softshard.trainer.recipe import TrainRecipe

ORDER_SALT = 0x6F72646572  # the order of samples must not be correlated with the views' draws


@dataclass(frozen=True)
class TrainingSet:
    """The rows of a .beton that train.

    Attributes:
        beton: Their file.
        views: The views in which they train.
        rows: int64 [N].
        stores: Of their soft labels; none: hard labels alone.
    """

    beton: Beton
    views: ViewRecipe
    rows: NDArray[np.int64]
    stores: tuple[Labels, ...]

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Rows in the order of an epoch, int64 [N]: a function of (seed, epoch, keys), not of the file's order."""
        words = stream_states(np.uint64(seed ^ ORDER_SALT), self.beton.keys[self.rows], epoch)
        return self.rows[np.argsort(words, kind="stable")]

    def steps(self, batch_size: int) -> int:
        """Updates in an epoch; a last incomplete global batch is left out."""
        return len(self.rows) // batch_size

    def view(self, epoch: int) -> int:
        """The view that an epoch trains on."""
        return epoch % self.views.count

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run resumes, as plain data; not the order of the images in the file."""
        rows = self.rows[np.argsort(self.beton.keys[self.rows])]
        content = array_digest(self.beton.keys[rows], self.beton.crc32[rows], self.beton.labels[rows])
        source = {"teachers", "ensemble", "flip_average", "top_k"}
        return {
            "images": len(rows),
            "digest_of_images": f"{content:016x}",
            "digest_of_classes": text_digest(self.beton.manifest.classes),
            "views": self.views.model_dump(mode="json"),
            "labels": [labels.store.manifest.model_dump(mode="json", include=source) for labels in self.stores],
        }


def open_training_set(recipe: TrainRecipe) -> TrainingSet:
    """Open and join what the recipe names.

    Raises:
        DataError: Labels that do not fit the images, views that are not labeled, or too few rows for one batch.
    """
    beton = open_beton(recipe.data.train)
    _check_classes(recipe, beton)
    stores = open_labels(recipe, beton)
    views = _views(recipe, stores)
    for labels in stores:
        labels.check_labeled(min(views.count, recipe.schedule.epochs))
    rows = np.flatnonzero(np.all([labels.rows >= 0 for labels in stores], axis=0)) if stores else np.arange(len(beton))
    if len(rows) < recipe.batch_size:
        raise DataError(
            f"{recipe.data.train}: expected at least batch_size = {recipe.batch_size} rows to train on, "
            f"found {len(rows)}; lower batch_size"
        )
    return TrainingSet(beton, views, rows, stores)


def open_validation_set(recipe: TrainRecipe) -> Beton:
    """Raises DataError when its classes are not as many as the student's."""
    beton = open_beton(recipe.data.validation)
    _check_classes(recipe, beton)
    return beton


def rank_slice(order: NDArray[np.int64], batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """This process's slice of every whole global batch of an epoch.

    Args:
        order: int64 [N], the rows in the order of the epoch.
        batch_size: Of the global batch.
        rank: Of this process.
        world_size: How many processes there are.

    Returns:
        Rows, int64 [steps, batch_size / world_size].
    """
    local = batch_size // world_size
    return order[: len(order) // batch_size * batch_size].reshape(-1, world_size, local)[:, rank]


def _views(recipe: TrainRecipe, stores: tuple[Labels, ...]) -> ViewRecipe:
    """The views of the stores, as many as each of them has and the recipe asks for."""
    if not stores:
        assert recipe.views is not None
        return recipe.views
    manifests = [labels.store.manifest for labels in stores]
    count = recipe.data.views or min(manifest.views.count for manifest in manifests)
    return manifests[0].views.model_copy(update={"count": count})


def _check_classes(recipe: TrainRecipe, beton: Beton) -> None:
    found = len(beton.manifest.classes)
    if found != recipe.student.num_classes:
        raise DataError(
            f"{beton.path}: expected {recipe.student.num_classes} classes, as the student has, "
            f"found {found}; correct one"
        )
