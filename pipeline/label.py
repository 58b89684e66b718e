"""views -> teacher -> top-k -> store. The unit of work, of commit and of resume is a block: one view of B rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from pipeline.beton import Beton, open_beton
from pipeline.errors import DataError
from pipeline.launch import StopSignal, make_accelerator
from pipeline.loader import ViewLoader
from pipeline.manifest import StoreManifest, TeacherRecord, library_versions, text_digest
from pipeline.probes import check_probes, make_probes
from pipeline.recipe import LabelRecipe
from pipeline.recipe_file import first_difference, save_recipe
from pipeline.store import Store, create_store, open_store
from pipeline.topk import Codes, encode
from teachers import Teacher, TeacherError, load_teacher


def label(recipe: LabelRecipe) -> bool:
    """Label every block that the store does not hold yet; False when a signal ended the work before its end.

    Batches are composed from a block's rows in order, so the finished store is the same whatever the number of
    processes and interruptions. Raises DataError when the store, the images or the teacher do not fit the recipe, and
    when the teacher's logits are not finite.
    """
    accelerator = make_accelerator("label")
    beton = open_beton(recipe.beton)
    _check_classes(recipe, beton)
    teacher = _load_teacher(accelerator, recipe)
    store = _shared_store(accelerator, recipe, _manifest(recipe, beton, teacher), beton)
    [blocks] = broadcast_object_list([store.missing()])
    share = blocks[accelerator.process_index :: accelerator.num_processes]
    loader = ViewLoader(
        beton,
        recipe.views,
        teacher.size,
        recipe.batch_size,
        recipe.workers,
        accelerator.device,
        os_cache=recipe.os_cache,
    )
    labeller = _Labeller(accelerator, beton, teacher, loader, recipe.top_k)
    images = sum(len(_rows(store, block)) for _, block in share)
    quiet = not accelerator.is_main_process or not share
    with StopSignal() as stop, tqdm(total=images, desc=f"label {recipe.store}", unit="img", disable=quiet) as progress:
        for view, block in share:
            codes = labeller.codes(_rows(store, block), view, stop, progress.update)
            if codes is None:
                return False
            store.write_block(view, block, codes)
    accelerator.wait_for_everyone()
    return True


@dataclass(frozen=True)
class _Labeller:
    accelerator: Accelerator
    beton: Beton
    teacher: Teacher
    loader: ViewLoader
    top_k: int

    def codes(self, rows: np.ndarray, view: int, stop: StopSignal, done: Callable[[int], object]) -> Codes | None:
        """Codes of one view of the rows, in their order; None when a stop signal came."""
        parts = []
        for batch in self.loader.render(rows, view):
            if stop.received:
                return None
            logits = self._logits(batch.images)
            self._check_finite(logits, batch.rows, view)
            parts.append(encode(logits, self.top_k))
            done(len(batch.rows))
        return Codes.concatenate(parts)

    @torch.inference_mode()
    def _logits(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.teacher(images).float()

    def _check_finite(self, logits: Tensor, rows: np.ndarray, view: int) -> None:
        bad = ~torch.isfinite(logits).all(dim=1).cpu().numpy()
        if bad.any():
            keys = [self.beton.manifest.keys[row] for row in rows[bad]]
            raise DataError(
                f"teacher {self.teacher.name}: expected finite logits, found NaN or infinity for view {view} of "
                f"{len(keys)} images, such as {', '.join(keys[:3])}; check the weights and the precision"
            )


def _rows(store: Store, block: int) -> np.ndarray:
    rows = store.rows(block)
    return np.arange(rows.start, rows.stop)


def _check_classes(recipe: LabelRecipe, beton: Beton) -> None:
    found = len(beton.manifest.classes)
    if found != recipe.classes:
        raise DataError(
            f"{recipe.beton}: expected {recipe.classes} classes, as the recipe says, found {found}; correct one"
        )


def _load_teacher(accelerator: Accelerator, recipe: LabelRecipe) -> Teacher:
    [teacher] = recipe.teachers
    try:
        with accelerator.main_process_first():  # one download serves all processes
            loaded = load_teacher(teacher.model, teacher.checkpoint, teacher.size, recipe.classes)
    except TeacherError as error:
        raise DataError(str(error)) from None
    return loaded.to(accelerator.device).to(memory_format=torch.channels_last)


def _manifest(recipe: LabelRecipe, beton: Beton, teacher: Teacher) -> StoreManifest:
    [wanted] = recipe.teachers
    mean, std = ((channel / 255).flatten().tolist() for channel in (teacher.mean, teacher.std))
    record = TeacherRecord(
        model=teacher.name,
        weights_digest=teacher.weights_digest(),
        size=teacher.size,
        mean=tuple(mean),
        std=tuple(std),
        weight=wanted.weight,
    )
    return StoreManifest(
        samples=len(beton),
        classes=recipe.classes,
        top_k=recipe.top_k,
        block_rows=recipe.block_rows,
        batch_size=recipe.batch_size,
        class_list_digest=text_digest(beton.manifest.classes),
        views=recipe.views,
        teachers=(record,),
        probes=(),  # rendered when the store is made
        libraries=library_versions(),
    )


def _shared_store(accelerator: Accelerator, recipe: LabelRecipe, manifest: StoreManifest, beton: Beton) -> Store:
    """The store of the recipe, made by the first process when there is none. One made from other work is refused."""
    path = Path(recipe.store)
    with accelerator.main_process_first():
        new = not path.exists()
        if new:
            probes = make_probes(beton, recipe.views, manifest.teachers[0].size)
            create_store(path, manifest.model_copy(update={"probes": probes}), beton.keys, beton.crc32)
            save_recipe(recipe, path.with_suffix(".recipe.yaml"))
        store = open_store(path)
    ignored = {"libraries", "probes"}
    difference = first_difference(manifest.model_dump(exclude=ignored), store.manifest.model_dump(exclude=ignored))
    if difference:
        raise DataError(f"{path}: expected a store of this recipe, found another: {difference}; name another store")
    if not (np.array_equal(store.keys, beton.keys) and np.array_equal(store.crc32, beton.crc32)):
        raise DataError(
            f"{path}: expected labels of the images in {recipe.beton}, found those of others; name another store"
        )
    if not new:
        check_probes(beton, store.manifest, str(path))
    return store
