"""Which rows train, in which order, with which labels."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.beton import Beton, open_beton
from pipeline.errors import DataError
from pipeline.manifest import match_keys, text_digest
from pipeline.probes import check_probes
from pipeline.recipe import ViewRecipe
from pipeline.store import Store, open_store
from pipeline.topk import Codes, SoftLabels, decode
from pipeline.views.draws import stream_states
from trainer.recipe import DataRecipe, TrainRecipe

ORDER_SALT = 0x6F72646572  # the order of samples must not be correlated with the views' draws
FEW = 3


@dataclass(frozen=True)
class TrainingSet:
    """The rows of a .beton that train, and their labels in a store (None: hard labels alone).

    `rows` int64 [N]; `store_rows` int64, for each row of the .beton its row in the store, -1 where it has none;
    `template` uint8, for each row of the store its tail template, when the loss wants it; `top_k`: fewer classes than
    the store keeps.
    """

    beton: Beton
    views: ViewRecipe
    rows: NDArray[np.int64]
    store: Store | None
    store_rows: NDArray[np.int64]
    template: NDArray[np.uint8] | None = None
    top_k: int | None = None

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Rows in the order of an epoch: a function of (seed, epoch, keys), whatever their order in the file."""
        words = stream_states(np.uint64(seed ^ ORDER_SALT), self.beton.keys[self.rows], epoch)
        return self.rows[np.argsort(words, kind="stable")]

    def steps(self, batch_size: int) -> int:
        """Updates in an epoch; a last incomplete global batch is left out."""
        return len(self.rows) // batch_size

    def view(self, epoch: int) -> int:
        return epoch % self.views.count

    def labels(self, epoch: int) -> "ViewLabels | None":
        """The soft labels of the view that this epoch reads, checked and in memory."""
        if self.store is None:
            return None
        classes, codes = self.store.manifest.classes, self.store.read_view(self.view(epoch))
        if self.top_k is not None:
            codes = codes.top(self.top_k, classes)
        return ViewLabels(codes, self.template, self.store_rows, classes)


@dataclass(frozen=True)
class ViewLabels:
    codes: Codes
    template: NDArray[np.uint8] | None
    store_rows: NDArray[np.int64]
    classes: int

    def soft(self, rows: NDArray[np.int64], temperature: float, device: torch.device) -> SoftLabels:
        """Soft labels of rows of the .beton at a temperature, decoded on the device."""
        places = self.store_rows[rows]
        parts = [part.to(device, non_blocking=True) for part in self.codes[places].tensors()]
        shapes = None
        if self.template is not None:
            shapes = torch.from_numpy(self.template[places]).to(device, non_blocking=True)
        return decode(parts[0], parts[1], parts[2], self.classes, temperature, shapes)


def open_training_set(recipe: TrainRecipe) -> TrainingSet:
    """Open and join what the recipe names.

    Raises DataError: labels of another class list or of other images, rows without labels (unless the recipe leaves
    them out), too few rows for one batch.
    """
    beton = open_beton(recipe.data.train)
    _check_classes(recipe, beton)
    if recipe.data.labels is None:
        assert recipe.views is not None
        training = TrainingSet(beton, recipe.views, np.arange(len(beton)), None, np.full(len(beton), -1))
    else:
        training = _with_labels(recipe, beton, open_store(recipe.data.labels))
    if len(training.rows) < recipe.batch_size:
        raise DataError(
            f"{recipe.data.train}: expected at least batch_size = {recipe.batch_size} rows to train on, "
            f"found {len(training.rows)}; lower batch_size"
        )
    return training


def open_validation_set(recipe: TrainRecipe) -> Beton:
    beton = open_beton(recipe.data.validation)
    _check_classes(recipe, beton)
    return beton


def _check_classes(recipe: TrainRecipe, beton: Beton) -> None:
    found = len(beton.manifest.classes)
    if found != recipe.student.num_classes:
        raise DataError(
            f"{beton.path}: expected {recipe.student.num_classes} classes, as the student has, "
            f"found {found}; correct one"
        )


def _with_labels(recipe: TrainRecipe, beton: Beton, store: Store) -> TrainingSet:
    """The part of a store that the recipe asks for: its rows, its first views, its most probable classes."""
    manifest, data = store.manifest, recipe.data
    for name, wanted, found in (("views", data.views, manifest.views.count), ("top_k", data.top_k, manifest.top_k)):
        if wanted is not None and wanted > found:
            raise DataError(f"data.{name}: expected at most {found}, as {data.labels} has, found {wanted}; correct it")
    store_rows = _join(data, beton, store)
    views = manifest.views.model_copy(update={"count": data.views or manifest.views.count})
    template = store.read_template() if manifest.template and recipe.loss.tail != "drop" else None
    return TrainingSet(beton, views, np.flatnonzero(store_rows >= 0), store, store_rows, template, data.top_k)


def _join(recipe: DataRecipe, beton: Beton, store: Store) -> NDArray[np.int64]:
    """For each row of the .beton its row in the store, -1 where it has none and may go without."""
    if store.manifest.class_list_digest != text_digest(beton.manifest.classes):
        raise DataError(
            f"{recipe.labels}: expected labels of the class list of {beton.path}, found those of another; "
            "label these images, or pack them with the same `classes` file"
        )
    place = match_keys(store.keys, beton.keys)
    found = place >= 0
    other = np.flatnonzero(found & (store.crc32[place] != beton.crc32))
    if len(other):
        raise DataError(
            f"{recipe.labels}: expected labels of the images in {beton.path}, found labels of other images under "
            f"{len(other)} of the keys, such as {_few(beton, other)}; label these images"
        )
    missing = np.flatnonzero(~found)
    if len(missing) and recipe.missing_labels == "error":
        raise DataError(
            f"{recipe.labels}: expected labels for all {len(beton)} images of {beton.path}, "
            f"found none for {len(missing)}, such as {_few(beton, missing)}; "
            "label them, or leave them out with data.missing_labels: skip"
        )
    if store.manifest.views.mixes and not (found.all() and len(beton) == len(store.keys)):
        raise DataError(
            f"{recipe.labels}: expected all {len(store.keys)} labelled images in {beton.path}, because views that mix "
            f"images depend on the whole set, found {int(found.sum())}; pack them all, or label these"
        )
    check_probes(beton, store.manifest, str(recipe.labels))
    return place


def _few(beton: Beton, rows: NDArray[np.int64]) -> str:
    return ", ".join(beton.manifest.keys[row] for row in rows[:FEW])


def share(order: NDArray[np.int64], batch_size: int, rank: int, processes: int) -> NDArray[np.int64]:
    """This process's rows of an epoch: its slice of every whole global batch, one after the other."""
    local = batch_size // processes
    return order[: len(order) // batch_size * batch_size].reshape(-1, processes, local)[:, rank].reshape(-1)
