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
from torch import Tensor
from tqdm import tqdm

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.manifest import StoreManifest, TeacherRecord, library_versions, text_digest
from softshard.pipeline.labels.labeler import LabeledBatch, Labeler
from softshard.pipeline.labels.preflight import check_top1, describe_run, describe_teachers, preflight
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import differences, dump_recipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.launch import StopSignal, make_accelerator
from softshard.pipeline.store.store import Store, create_store, open_store, store_exists
from softshard.pipeline.store.topk import Codes
from softshard.pipeline.views.golden import check_probes, make_probes
from softshard.teachers import Teacher, TeacherError, load_teacher

Unit = tuple[range, int]  # views that are labeled together, and a block


def label(recipe: LabelRecipe, views: range | None = None) -> bool:
    """Label every block that the store does not hold yet; False when a signal ended the work before its end.

    views: label these alone, so that several launches share the work; None: all. Batches are composed from a block's
    rows in order, so the finished store is the same whatever the number of processes, launches and interruptions.
    Raises DataError when the store, the images or the teachers do not fit the recipe, the teachers fall short of
    `min_top1`, their logits are not finite, or the disk has no room.
    """
    started, wanted = time.time(), _wanted(recipe, views)
    accelerator = make_accelerator("label", recipe.precision)
    labeler, manifest = make_labeler(recipe, accelerator)
    main, processes = accelerator.is_main_process, accelerator.num_processes
    [units] = broadcast_object_list([_prepare(labeler, manifest, wanted, processes) if main else []])
    store = open_store(recipe.store)
    share = units[accelerator.process_index :: processes]
    total = sum(len(views) * len(_rows(store, block)) for views, block in share)
    quiet = not accelerator.is_main_process or not share
    bar = tqdm(total=total, desc=f"label {recipe.store}", unit="view", smoothing=0.1, disable=quiet)
    with StopSignal() as stop, bar as progress, ThreadPoolExecutor(1, "write") as writer:
        finished = label_units(labeler, store, share, stop, _Status(progress).update, writer)
    if finished:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            store.place.sweep(started)  # launches that run now have begun their files since
    return finished


def estimate(recipe: LabelRecipe, views: range | None = None) -> str:
    """What a run would do, from a few measured batches; nothing is written. Raises DataError as `label` does."""
    wanted, accelerator = _wanted(recipe, views), make_accelerator("label", recipe.precision)
    labeler, manifest = make_labeler(recipe, accelerator)
    found = preflight(labeler, manifest)
    check_top1(found, recipe.min_top1)
    run = describe_run(found, manifest, len(wanted), accelerator.num_processes)
    return f"{describe_teachers(found, manifest)}\n{run}"


def make_labeler(recipe: LabelRecipe, accelerator: Accelerator) -> tuple[Labeler, StoreManifest]:
    """The teachers of a recipe with the images they look at, and the manifest of a store that they make (without
    probes). Raises DataError when they do not fit together."""
    beton = open_beton(recipe.beton)
    found = len(beton.manifest.classes)
    if found != recipe.classes:
        raise DataError(
            f"{recipe.beton}: expected {recipe.classes} classes, as the recipe says, found {found}; correct one"
        )
    with accelerator.main_process_first():  # one download serves all processes
        teachers = _load_teachers(recipe)
    manifest = _manifest(recipe, beton, teachers)
    return Labeler(recipe, beton, teachers, accelerator.device), manifest


def open_matching(labeler: Labeler, manifest: StoreManifest) -> Store:
    """The store of the labeler's recipe. Raises DataError when it was made from other work, naming the first
    difference, and when views are no longer rendered as they were. It may have fewer views than the recipe."""
    recipe, beton = labeler.recipe, labeler.beton
    store = open_store(recipe.store)
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
    return store


def missing_units(store: Store, views: range) -> list[Unit]:
    """What is not labeled yet: the views of the template together, where one of them or the template is missing,
    then view by view."""
    missing = store.digests() == 0
    together = range(store.manifest.template.views) if store.manifest.template else range(0)
    units: list[Unit] = []
    if together and together[0] in views:
        open_blocks = missing[together].any(axis=0) | (store.template_digests() == 0)
        units = [(together, int(block)) for block in np.flatnonzero(open_blocks)]
    alone = (view for view in views if view not in together)
    return units + [(range(view, view + 1), int(block)) for view in alone for block in np.flatnonzero(missing[view])]


def _wanted(recipe: LabelRecipe, views: range | None) -> range:
    count, template = recipe.views.count, recipe.template.views if recipe.template else 0
    if views is None:
        return range(count)
    if views.stop > count:
        raise DataError(
            f"--views: expected numbers from 0 to {count - 1}, as views.count says, found {views.stop - 1}; correct one"
        )
    if views.start < template and not (views.start == 0 and views.stop >= template):
        raise DataError(
            f"--views: expected all of the views 0-{template - 1} that make the tail template or none of them, "
            f"found {views.start}-{views.stop - 1}; go from 0 to {template - 1} at least, or start at {template}"
        )
    return views


def _prepare(labeler: Labeler, manifest: StoreManifest, views: range, processes: int) -> list[Unit]:
    """Make the store, or make room for more views in it, once the teachers have shown what they do; returns what is to
    be labeled."""
    recipe = labeler.recipe
    store = open_matching(labeler, manifest) if store_exists(recipe.store) else None
    grows = store is not None and store.manifest.views.count < recipe.views.count
    units = missing_units(store, views) if store and not grows else None
    if units is not None and not units:
        return []
    found = preflight(labeler, manifest)
    print(describe_teachers(found, manifest))
    check_top1(found, recipe.min_top1)
    if store is None:
        probes = make_probes(labeler.beton, recipe.views, labeler.sizes[0])
        whole, beton = manifest.model_copy(update={"probes": probes}), labeler.beton
        create_store(recipe.store, whole, beton.keys, beton.crc32, exist_ok=True)
        store = open_matching(labeler, manifest)  # another launch may have been faster, with another recipe
    elif grows:
        store.grow(recipe.views.count)
    store.place.write_beside(".recipe.yaml", dump_recipe(recipe).encode())
    if units is None:
        units = missing_units(store, views)
    left = sum(len(together) * len(_rows(store, block)) for together, block in units)
    views_left = -(-left // manifest.samples)
    print(describe_run(found, manifest, views_left, processes))
    needed, free = found.stored_bytes(manifest, views_left), store.place.free_bytes()
    if free is not None and needed > free:
        raise DataError(
            f"{recipe.store}: expected about {needed / 1e6:.0f} MB of free disk for what is not labeled yet, found "
            f"{free / 1e6:.0f} MB; make room, or lower views.count or top_k"
        )
    return units


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
    units: Sequence[Unit],
    stop: StopSignal,
    update: Callable[[range, LabeledBatch], None],
    writer: ThreadPoolExecutor,
) -> bool:
    """Label units one after the other, each written while the next one is labeled; False when a stop signal came."""
    writing: Future[None] | None = None
    for views, block in units:
        if not _is_open(store, views, block):
            continue  # another launch was faster
        rows = _rows(store, block)
        parts = _parts(labeler, rows, views, _makes_template(store, views), stop, update)
        if writing:
            writing.result()
        if parts is None:
            return False
        writing = writer.submit(_commit, store, views, block, parts)
    if writing:
        writing.result()
    return True


def _parts(
    labeler: Labeler,
    rows: np.ndarray,
    views: range,
    template: bool,
    stop: StopSignal,
    update: Callable[[range, LabeledBatch], None],
) -> list[LabeledBatch] | None:
    """Labels of some views of the rows, in their order; None when a stop signal came."""
    parts = []
    for part in labeler.labels(rows, np.tile(np.arange(views.start, views.stop), (len(rows), 1)), template):
        if stop.received:
            return None
        parts.append(part)
        update(views, part)
    return parts


def _commit(store: Store, views: range, block: int, parts: Sequence[LabeledBatch]) -> None:
    templates = [part.template for part in parts if part.template is not None]
    if templates:
        store.write_template(block, np.concatenate(templates))
    codes = Codes.concatenate([part.codes for part in parts])
    for place, view in enumerate(views):
        store.write_block(view, block, codes[place :: len(views)])


def _makes_template(store: Store, views: range) -> bool:
    return store.manifest.template is not None and views.start == 0


def _is_open(store: Store, views: range, block: int) -> bool:
    """Whether something of a unit is still missing."""
    if _makes_template(store, views) and not store.has_template(block):
        return True
    return not all(store.is_block_labeled(view, block) for view in views)


def _rows(store: Store, block: int) -> np.ndarray:
    rows = store.rows(block)
    return np.arange(rows.start, rows.stop)


def _load_teachers(recipe: LabelRecipe) -> list[Teacher]:
    try:
        return [
            load_teacher(teacher.model, teacher.library, teacher.checkpoint, teacher.size, recipe.classes)
            for teacher in recipe.teachers
        ]
    except TeacherError as error:
        raise DataError(str(error)) from None


def _manifest(recipe: LabelRecipe, beton: Beton, teachers: Sequence[Teacher]) -> StoreManifest:
    records = [
        TeacherRecord(
            model=teacher.name,
            library=teacher.library,
            weights_digest=teacher.weights_digest(),
            size=teacher.size,
            mean=_fractions(teacher.mean),
            std=_fractions(teacher.std),
            interpolation=teacher.interpolation,
            weight=wanted.weight,
        )
        for teacher, wanted in zip(teachers, recipe.teachers, strict=True)
    ]
    shared = ("classes", "top_k", "block_rows", "batch_size", "views", "ensemble", "flip_average", "template")
    device = ("precision", "channels_last", "compile")
    return StoreManifest(
        samples=len(beton),
        class_list_digest=text_digest(beton.manifest.classes),
        teachers=tuple(records),
        probes=(),  # rendered when the store is made
        libraries=library_versions(),
        **{name: getattr(recipe, name) for name in shared + device},
    )


def _fractions(channels: Tensor) -> tuple[float, float, float]:
    red, green, blue = (channels / 255).flatten().tolist()
    return red, green, blue
