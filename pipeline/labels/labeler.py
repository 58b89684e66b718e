"""Rows and views -> pixels -> teachers -> codes: what labeling, its estimate and its verification have in common."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.topk import Codes, Encoded, encode_on_device, encode_template, to_codes
from softshard.pipeline.views.batch import Batch
from softshard.pipeline.views.loader import ViewLoader
from softshard.teachers import Ensemble, Teacher, TeacherError

MOST_LISTED = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TeacherOutput(NamedTuple):
    """For a batch of B images in G views: rows int64 [B], views int64 [B, G], logits float32 [B, G, C] on the teacher's
    device, hard int64 [B, G], the hard label of each view (of its larger part where images are mixed)."""

    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    logits: Tensor
    hard: Tensor


class LabeledBatch(NamedTuple):
    """Of a batch: codes of [B * G] views, image by image; whether each teacher's first class is the hard label, bool
    [B * G]; the tail template of each image over its G views, uint8 [B, C], where it was asked for."""

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
        """What the teachers say about views [N, G] of the rows, in batches of whole images.

        Raises DataError when images have changed or do not decode.
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
        """The codes of views [N, G] of the rows. The teacher works on a batch while the codes of the one before are
        fetched from its device.

        Raises DataError as `outputs` does, and when logits are not finite, naming the images.
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
