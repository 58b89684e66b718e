"""The soft labels of the rows that train: stores joined to a .beton by key, read a view at a time and ahead of use."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import match_keys, text_digest
from softshard.pipeline.recipes.yaml_file import differences
from softshard.pipeline.runtime.errors import DataError, few
from softshard.pipeline.store.store import Store, open_store
from softshard.pipeline.store.topk import Codes, decode, decode_on
from softshard.pipeline.views.golden import check_probes
from softshard.trainer.losses import Weighted
from softshard.trainer.recipe import DataRecipe, LabelsRecipe, TrainRecipe


@dataclass(frozen=True)
class Labels:
    """A store's labels for the rows of a .beton.

    Attributes:
        store: Where they are.
        rows: int64 [N], for each row of the .beton its row in the store, -1 where it has none.
        template: uint8 [rows of the store, C], their tail templates, where the loss spreads the tail.
        top_k: Fewer classes than the store keeps; None: all.
        weight: Relative to other stores.
    """

    store: Store
    rows: NDArray[np.int64]
    template: NDArray[np.uint8] | None
    top_k: int | None
    weight: float

    @property
    def classes(self) -> int:
        """C, the number of classes of the store."""
        return self.store.manifest.classes

    def read_view(self, view: int) -> Codes:
        """The codes of all rows of the store in one view, checked.

        Raises:
            DataError: The view is not labeled.
            FormatError: It is damaged.
        """
        return self._top(self.store.read_view(view))

    def read_rows(self, view: int, rows: NDArray[np.int64]) -> Codes:
        """The codes of rows of the .beton (int64 [B]) in one view, checked.

        Raises:
            DataError: The view is not labeled.
            FormatError: It is damaged.
        """
        return self._top(self.store.read_rows(view, self.rows[rows]))

    def soft(self, codes: Codes, rows: NDArray[np.int64], temperature: float, device: torch.device) -> Weighted:
        """Decode the soft labels of rows of the .beton (int64 [B]) from the codes of a whole view."""
        rows_in_store = self.rows[rows]
        template = None if self.template is None else self.template[rows_in_store]
        return self.weight, decode_on(device, codes[rows_in_store], self.classes, temperature, template)

    def check_labeled(self, views: int) -> None:
        """Check that views are labeled; read_view checks their content.

        Args:
            views: How many of them, from the first.

        Raises:
            DataError: A block of one of them is missing.
        """
        coverage = self.store.coverage()[:views]
        if (coverage < self.store.blocks).any():
            view = int(np.argmax(coverage < self.store.blocks))
            fewer = f", or train on fewer views with data.views: {view}" if view else ""
            raise DataError(
                f"{self.store.name}: expected all {self.store.blocks} blocks labeled in each of the {views} views to "
                f"train on, found {coverage[view]} in view {view}; finish labeling{fewer}"
            )

    def _top(self, codes: Codes) -> Codes:
        return codes if self.top_k is None else codes.top(self.top_k, self.classes)


@dataclass(frozen=True)
class EpochLabels:
    """The labels of one view: those of each store, with its codes for that view."""

    parts: tuple[tuple[Labels, Codes], ...]

    def soft(self, rows: NDArray[np.int64], temperature: float, device: torch.device) -> list[Weighted]:
        """Decode the soft labels of rows of the .beton.

        Args:
            rows: int64 [B].
            temperature: At which their probabilities are wanted.
            device: On which they are decoded.

        Returns:
            For each store its weight and its labels.
        """
        return [labels.soft(codes, rows, temperature, device) for labels, codes in self.parts]


class LabelReader:
    """Reads views of some stores in a thread of its own, each once: the one that trains and the one that comes next."""

    def __init__(self, stores: Sequence[Labels]) -> None:
        self._stores = tuple(stores)
        self._pool = ThreadPoolExecutor(1, "labels")
        self._views: dict[int, Future[EpochLabels]] = {}

    def __enter__(self) -> "LabelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def labels(self, view: int, coming: int) -> EpochLabels | None:
        """The labels of a view; begins to read those of the coming one.

        Args:
            view: Waited for when it has not been read yet.
            coming: The view that is asked for next.

        Returns:
            None without stores.

        Raises:
            DataError: A view is not labeled.
            FormatError: A view is damaged.
        """
        if not self._stores:
            return None
        wanted = dict.fromkeys((view, coming))
        self._views = {number: self._views.get(number) or self._pool.submit(self._read, number) for number in wanted}
        return self._views[view].result()

    def _read(self, view: int) -> EpochLabels:
        return EpochLabels(tuple((labels, labels.read_view(view)) for labels in self._stores))


def teacher_classes(stores: Sequence[Labels], view: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the teachers, by weight, find most probable.

    Args:
        stores: Of the teachers; at least one.
        view: Of the images.
        rows: int64 [B], of the .beton.

    Returns:
        Classes, int64 [B].
    """
    codes = [labels.read_rows(view, rows) for labels in stores]
    if len(stores) == 1:
        return codes[0].index[:, 0].astype(np.int64)
    probability = torch.zeros(len(rows), stores[0].classes)
    for labels, part in zip(stores, codes, strict=True):
        soft = decode(*part.tensors(), labels.classes, 1.0)
        probability.scatter_add_(1, soft.index, labels.weight * soft.probability)
    return probability.argmax(dim=1).numpy()


def open_labels(recipe: TrainRecipe, beton: Beton) -> tuple[Labels, ...]:
    """The stores of a recipe, joined to a .beton; none for hard labels alone.

    Raises:
        DataError: Labels of another class list or of other images, rows without labels (unless the recipe leaves them
            out), more views or classes than a store has, or stores of different views.
    """
    stores = tuple(_open(recipe, beton, part) for part in recipe.data.labels or ())
    views = [labels.store.manifest.views.model_dump(exclude={"count"}) for labels in stores]
    for labels, other in zip(stores[1:], views[1:], strict=True):
        difference = next(differences(views[0], other, "views"), None)
        if difference:
            raise DataError(
                f"{labels.store.name}: expected the views of {stores[0].store.name}, since one batch of pixels gets "
                f"the labels of both, found others: {difference}; label the same views with each teacher"
            )
    return stores


def _open(recipe: TrainRecipe, beton: Beton, part: LabelsRecipe) -> Labels:
    """The part of a store that the recipe asks for: its rows, its most probable classes."""
    data, store = recipe.data, open_store(part.store)
    manifest = store.manifest
    for name, wanted, found in (("views", data.views, manifest.views.count), ("top_k", data.top_k, manifest.top_k)):
        if wanted is not None and wanted > found:
            raise DataError(f"data.{name}: expected at most {found}, as {part.store} has, found {wanted}; correct it")
    rows = _join(data, beton, store)
    template = store.read_template() if manifest.template and recipe.loss.tail == "spread" else None
    return Labels(store, rows, template, data.top_k, part.weight)


def _join(recipe: DataRecipe, beton: Beton, store: Store) -> NDArray[np.int64]:
    """For each row of the .beton its row in the store, -1 where it has none and may go without."""
    if store.manifest.class_list_digest != text_digest(beton.manifest.classes):
        raise DataError(
            f"{store.name}: expected labels of the class list of {beton.path}, found those of another; "
            "label these images, or pack them with the same `classes` file"
        )
    rows = match_keys(store.keys, beton.keys)
    found = rows >= 0
    other = np.flatnonzero(found & (store.crc32[rows] != beton.crc32))
    if len(other):
        raise DataError(
            f"{store.name}: expected labels of the images in {beton.path}, found labels of other images under "
            f"{len(other)} of the keys, such as {_few(beton, other)}; label these images, or take the .beton "
            "that was labeled"
        )
    missing = np.flatnonzero(~found)
    if len(missing) and recipe.missing_labels == "error":
        raise DataError(
            f"{store.name}: expected labels for all {len(beton)} images of {beton.path}, "
            f"found none for {len(missing)}, such as {_few(beton, missing)}; "
            "label them, or leave them out with data.missing_labels: skip"
        )
    if store.manifest.views.mixes and not (found.all() and len(beton) == len(store.keys)):
        raise DataError(
            f"{store.name}: expected all {len(store.keys)} labeled images in {beton.path}, because views that mix "
            f"images depend on the whole set, found {int(found.sum())}; pack them all, or label these"
        )
    check_probes(beton, store.manifest, store.name)
    return rows


def _few(beton: Beton, rows: NDArray[np.int64]) -> str:
    return few([beton.manifest.keys[int(row)] for row in rows])
