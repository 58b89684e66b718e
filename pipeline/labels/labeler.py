"""Rows and views -> pixels -> teachers -> codes: what labeling, its preflight and the spot check have in common."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.images.manifest import StoreManifest, TeacherRecord, library_versions, text_digest
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.topk import Codes, Encoded, encode_on_device, encode_template, to_codes
from softshard.pipeline.views.batch import Batch
from softshard.pipeline.views.loader import ViewLoader
from softshard.teachers import Ensemble, Teacher, TeacherError, load_teacher

MOST_LISTED = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TeacherOutput(NamedTuple):
    """What the teachers say about a batch of B images in G views.

    rows int64 [B], views int64 [B, G], logits float32 [B, G, C] on the teacher's device, hard int64 [B, G], the hard
    label of each view (of its larger part where images are mixed).
    """

    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    logits: Tensor
    hard: Tensor


class LabeledBatch(NamedTuple):
    """The labels of a batch of B images in G views.

    Codes of [B * G] views, image by image; whether the teachers' first class is the hard label, bool [B * G]; the tail
    template of each image over its G views, uint8 [B, C], where it was asked for.
    """

    codes: Codes
    correct: NDArray[np.bool_]
    template: NDArray[np.uint8] | None


class Labeler:
    """The teachers of a recipe on a device, and loaders that render what each of them looks at."""

    def __init__(self, recipe: LabelRecipe, beton: Beton, teachers: Sequence[Teacher], device: torch.device) -> None:
        ensemble = Ensemble(
            teachers, [teacher.weight for teacher in recipe.teachers], recipe.ensemble, recipe.flip_average
        )
        self.recipe, self.beton, self.sizes = recipe, beton, ensemble.sizes
        self._device = device
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        ensemble = ensemble.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        self.ensemble = torch.compile(ensemble) if recipe.compile else ensemble
        self._loaders: dict[int, list[ViewLoader]] = {}

    def outputs(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Iterator[TeacherOutput]:
        """What the teachers say about views of images, in batches of whole images.

        Args:
            rows: of the packed images, int64 [N].
            views: the numbers of the views of each, int64 [N, G].

        Raises:
            DataError: when images have changed or do not decode.
        """
        start = 0
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(loader.render(rows, views))) for loader in self._sized(views.shape[1])
            ]
            for batches in zip(*streams, strict=True):
                end = start + len(batches[0].rows)
                yield self._output(batches, views[start:end])
                start = end

    def labels(self, rows: NDArray[np.int64], views: NDArray[np.int64], template: bool) -> Iterator[LabeledBatch]:
        """The codes of views of images.

        The teacher works on a batch while the codes of the one before are fetched from its device.

        Args:
            rows: of the packed images, int64 [N].
            views: the numbers of the views of each, int64 [N, G].
            template: whether the mean over the G views is wanted, too.

        Raises:
            DataError: as `outputs` does, and when logits are not finite, naming the images.
        """
        waiting = None
        for output in self.outputs(rows, views):
            logits = output.logits.flatten(0, 1)
            finite = torch.isfinite(logits).all(dim=1)
            encoded = encode_on_device(logits, self.recipe.top_k)
            shapes = encode_template(output.logits) if template else None
            if waiting:
                yield self._fetch(*waiting)
            waiting = output, finite, encoded, shapes
        if waiting:
            yield self._fetch(*waiting)

    def _sized(self, views: int) -> list[ViewLoader]:
        """A loader for each input size; its batches have as many images as make batch_size views."""
        if views not in self._loaders:
            recipe, images = self.recipe, max(1, self.recipe.batch_size // views)
            shared = (images, recipe.workers, self._device)
            self._loaders[views] = [
                ViewLoader(self.beton, recipe.views, size, *shared, os_cache=recipe.os_cache) for size in self.sizes
            ]
        return self._loaders[views]

    @torch.inference_mode()
    def _output(self, batches: tuple[Batch, ...], views: NDArray[np.int64]) -> TeacherOutput:
        first = batches[0]
        images = {size: batch.images.flatten(0, 1) for size, batch in zip(self.sizes, batches, strict=True)}
        half = DTYPES.get(self.recipe.precision)
        try:
            with torch.autocast(self._device.type, half, enabled=half is not None):
                logits = self.ensemble(images).float()
        except TeacherError as error:
            raise DataError(str(error)) from None
        hard = first.labels[:, None].expand(views.shape)
        if first.mixed:
            hard = torch.where(first.mixed.lam >= 0.5, hard, first.mixed.labels)
        return TeacherOutput(first.rows, views, logits.unflatten(0, views.shape), hard)

    def _fetch(self, output: TeacherOutput, finite: Tensor, encoded: Encoded, shapes: Tensor | None) -> LabeledBatch:
        self._check_finite(output, finite)
        codes = to_codes(encoded, output.logits.shape[-1])
        correct = codes.index[:, 0] == output.hard.flatten().cpu().numpy()
        return LabeledBatch(codes, correct, None if shapes is None else shapes.cpu().numpy())

    def _check_finite(self, output: TeacherOutput, finite: Tensor) -> None:
        bad = ~finite.cpu().numpy().reshape(output.views.shape)
        if bad.any():
            keys = [self.beton.manifest.keys[row] for row in output.rows[bad.any(axis=1)]]
            raise DataError(
                f"teachers: expected finite logits, found NaN or infinity for {len(keys)} images, such as "
                f"view {output.views[bad][0]} of {', '.join(keys[:MOST_LISTED])}; check the weights and the precision"
            )


def make_labeler(recipe: LabelRecipe, accelerator: Accelerator) -> tuple[Labeler, StoreManifest]:
    """The teachers of a recipe with the images they look at, and the manifest of their store, without golden probes.

    Raises:
        DataError: when images, classes and teachers do not fit together, or a teacher cannot be loaded.
    """
    beton = open_beton(recipe.beton)
    found = len(beton.manifest.classes)
    if found != recipe.classes:
        raise DataError(
            f"{recipe.beton}: expected {recipe.classes} classes, as the recipe says, found {found}; correct one"
        )
    with accelerator.main_process_first():  # one download serves all processes
        teachers = _load_teachers(recipe)
    manifest = _store_manifest(recipe, beton, teachers)
    return Labeler(recipe, beton, teachers, accelerator.device), manifest


def _load_teachers(recipe: LabelRecipe) -> list[Teacher]:
    try:
        return [
            load_teacher(teacher.model, teacher.library, teacher.checkpoint, teacher.size, recipe.classes)
            for teacher in recipe.teachers
        ]
    except TeacherError as error:
        raise DataError(str(error)) from None


def _store_manifest(recipe: LabelRecipe, beton: Beton, teachers: Sequence[Teacher]) -> StoreManifest:
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
