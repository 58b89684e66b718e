"""views -> teachers -> top-k -> store. The unit of work, of commit and of resume is a block: one view of B rows.

With a tail template the first T views of a block are one unit: they come from one decode, and their mean is the
template, which is committed before their codes.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.labels.labeler import LabeledBatch, Labeler, make_labeler
from softshard.pipeline.labels.plan import WorkUnit, count_views, plan_work, rows_of_block, wanted_views
from softshard.pipeline.labels.preflight import check_room, check_top1, describe_run, describe_teachers, preflight
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import differences, dump_recipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.launch import StopSignal, make_accelerator
from softshard.pipeline.store.store import Store, create_store, open_store, store_exists
from softshard.pipeline.store.topk import Codes
from softshard.pipeline.views.golden import check_probes, make_probes


def label(recipe: LabelRecipe, views: Sequence[int] | None = None) -> bool:
    """Label every block that the store does not hold yet.

    Batches are composed from a block's rows in order, so the finished store is the same whatever the number of
    processes, launches and interruptions.

    Args:
        recipe: what to label, with which teachers, and where the store is.
        views: label these alone, so that several launches divide the work; None: all.

    Returns:
        False when a signal ended the work before its end.

    Raises:
        DataError: when the store, the images or the teachers do not fit the recipe, the teachers fall short of
            `min_top1`, their logits are not finite, or the disk has no room.
        RecipeError: when the views do not fit the recipe.
    """
    started, wanted = time.time(), wanted_views(recipe, views)
    accelerator = make_accelerator("label", recipe.precision)
    labeler, manifest = make_labeler(recipe, accelerator)
    store, units = _store_and_units(labeler, manifest, wanted, accelerator)
    units_of_rank = units[accelerator.process_index :: accelerator.num_processes]
    with StopSignal() as stop, _progress_bar(store, units_of_rank, accelerator) as bar:
        finished = label_units(labeler, store, units_of_rank, stop, _Status(bar).update)
    if finished:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            store.location.sweep(started)  # launches that run now have begun their files since
    return finished


def estimate(recipe: LabelRecipe, views: Sequence[int] | None = None) -> str:
    """What a run would do, from a few measured batches; nothing is written. Raises as `label` does."""
    wanted, accelerator = wanted_views(recipe, views), make_accelerator("label", recipe.precision)
    labeler, manifest = make_labeler(recipe, accelerator)
    found = preflight(labeler, manifest)
    check_top1(found, recipe.min_top1)
    run = describe_run(found, manifest, len(wanted), accelerator.num_processes)
    return f"{describe_teachers(found, manifest)}\n{run}"


def _store_and_units(
    labeler: Labeler, manifest: StoreManifest, views: Sequence[int], accelerator: Accelerator
) -> tuple[Store, list[WorkUnit]]:
    """The store and what is to be labeled in it. The main process prepares both, the others wait for it."""
    store, units = None, []
    if accelerator.is_main_process:
        store, units = _prepare(labeler, manifest, views, accelerator.num_processes)
    [units] = broadcast_object_list([units])
    return store or open_store(labeler.recipe.store), units


def _prepare(
    labeler: Labeler, manifest: StoreManifest, views: Sequence[int], processes: int
) -> tuple[Store, list[WorkUnit]]:
    """Plan the work and, where there is any, make the store or room in it, once the teachers are seen to be right."""
    recipe = labeler.recipe
    store = open_store(recipe.store) if store_exists(recipe.store) else None
    if store:
        check_matches(store, labeler, manifest)
    units = plan_work(manifest, views, store)
    if store and not units:
        return store, units
    found = preflight(labeler, manifest)
    print(describe_teachers(found, manifest))
    check_top1(found, recipe.min_top1)
    store = _create_or_grow(store, labeler, manifest)
    views_left = -(-count_views(store, units) // manifest.samples)
    print(describe_run(found, manifest, views_left, processes))
    check_room(store, found, manifest, views_left)
    return store, units


def check_matches(store: Store, labeler: Labeler, manifest: StoreManifest) -> None:
    """Check that a store is of this recipe's work; it may have fewer views.

    Raises:
        DataError: when it was made from other work, naming the first difference, and when views are no longer rendered
            as they were.
    """
    recipe, beton = labeler.recipe, labeler.beton
    wanted, found = (document.model_dump(exclude={"libraries", "probes"}) for document in (manifest, store.manifest))
    if found["views"]["count"] < recipe.views.count:
        found["views"]["count"] = recipe.views.count
    difference = next(differences(wanted, found), None)
    if difference:
        raise DataError(
            f"{recipe.store}: expected a store of this recipe, found another: {difference}; name another store"
        )
    if not (np.array_equal(store.keys, beton.keys) and np.array_equal(store.crc32, beton.crc32)):
        raise DataError(
            f"{recipe.store}: expected labels of the images in {recipe.beton}, found those of others; "
            "name another store"
        )
    check_probes(beton, store.manifest, recipe.store)


def _create_or_grow(store: Store | None, labeler: Labeler, manifest: StoreManifest) -> Store:
    """A store with room for all of the recipe's views, and the recipe beside it."""
    recipe, beton = labeler.recipe, labeler.beton
    if store is None:
        probes = make_probes(beton, recipe.views, labeler.sizes[0])
        whole = manifest.model_copy(update={"probes": probes})
        store = create_store(recipe.store, whole, beton.keys, beton.crc32, exist_ok=True)
        check_matches(store, labeler, manifest)  # another launch may have been faster, with another recipe
    if store.manifest.views.count < recipe.views.count:
        store.grow(recipe.views.count)
    store.location.write_beside(".recipe.yaml", dump_recipe(recipe).encode())
    return store


def _progress_bar(store: Store, units: Sequence[WorkUnit], accelerator: Accelerator) -> tqdm:
    """The main process shows how far its own units are."""
    quiet = not accelerator.is_main_process or not units
    total = count_views(store, units)
    return tqdm(total=total, desc=f"label {store.name}", unit="view", smoothing=0.1, disable=quiet)


class _Status:
    """The status line: views done, rate, time left, and how often the teacher's first class is the hard label."""

    def __init__(self, progress: tqdm) -> None:
        self._progress, self._correct, self._count = progress, 0, 0

    def update(self, views: range, labels: LabeledBatch) -> None:
        self._correct += int(labels.correct.sum())
        self._count += len(labels.correct)
        which = str(views.start) if len(views) == 1 else f"{views.start}-{views.stop - 1}"
        self._progress.set_postfix_str(f"view {which}, top-1 {100 * self._correct / self._count:.1f} %", refresh=False)
        self._progress.update(len(labels.correct))


def label_units(
    labeler: Labeler,
    store: Store,
    units: Sequence[WorkUnit],
    stop: StopSignal,
    update: Callable[[range, LabeledBatch], None],
) -> bool:
    """Label units one after the other, each written while the next one is labeled.

    `update` is called with a unit's views and each of its batches.

    Returns:
        False when a stop signal came; the unit in work is dropped then.
    """
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, "write") as writer:
        for unit in units:
            if not _is_open(store, unit):
                continue  # another launch was faster
            batches = _label_unit(labeler, store, unit, stop, update)
            if writing:
                writing.result()
            if batches is None:
                return False
            writing = writer.submit(_commit, store, unit, batches)
        if writing:
            writing.result()
    return True


def _label_unit(
    labeler: Labeler, store: Store, unit: WorkUnit, stop: StopSignal, update: Callable[[range, LabeledBatch], None]
) -> list[LabeledBatch] | None:
    """The labels of a unit's rows, in their order; None when a stop signal came."""
    rows, batches = rows_of_block(store, unit.block), []
    views = np.tile(np.arange(unit.views.start, unit.views.stop), (len(rows), 1))
    for batch in labeler.labels(rows, views, _makes_template(store, unit)):
        if stop.received:
            return None
        batches.append(batch)
        update(unit.views, batch)
    return batches


def _commit(store: Store, unit: WorkUnit, batches: Sequence[LabeledBatch]) -> None:
    templates = [batch.template for batch in batches if batch.template is not None]
    if templates:
        store.write_template(unit.block, np.concatenate(templates))
    codes = Codes.concatenate([batch.codes for batch in batches])
    for column, view in enumerate(unit.views):  # codes stand image by image, each with all views of the unit
        store.write_block(view, unit.block, codes[column :: len(unit.views)])


def _makes_template(store: Store, unit: WorkUnit) -> bool:
    return store.manifest.template is not None and unit.views.start == 0


def _is_open(store: Store, unit: WorkUnit) -> bool:
    """Whether something of a unit is still missing."""
    if _makes_template(store, unit) and not store.has_template(unit.block):
        return True
    return not all(store.is_block_labeled(view, unit.block) for view in unit.views)
