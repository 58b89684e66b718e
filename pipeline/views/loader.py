"""The loader: rows and view numbers in, batches of pixels out, rendered by one FFCV decoder in a background thread.

FFCV ignores the return code of its JPEG decoder. Here that, a wrong checksum or an exception raises an error that names
the images, and leaving the loop by any way closes the epoch. `softshard.pipeline.images.ffcv_bridge` has what else FFCV
needs.
"""

import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.ffcv_bridge import (
    AllocationQuery,
    DecodeError,
    Epoch,
    ImageDecoder,
    Loader,
    make_loader,
)
from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.pipeline.views.batch import Batch, Mixed
from softshard.pipeline.views.kernels.rng import ONE
from softshard.pipeline.views.parameters import ViewParameters, center_fraction, view_parameters
from softshard.pipeline.views.render import find_partners, render

NOTICE_SECONDS = 3.0
NO_SLOTS = np.zeros(1, np.uint32)
PARTS_A_WORKER = 4  # a batch is dealt in more parts than threads, so that none waits long for the others


class ViewLoader:
    """Renders any list of (row, view) pairs of a .beton at one output size.

    Args:
        beton: the packed images.
        views: their recipe, or None for a loader that only renders the center view (validation).
        size: pixels of a view's side.
        batch_size: images in a batch.
        workers: decoding threads.
        device: where batches go.
        crop_pct: timm's, for the center view.
        os_cache: FFCV's. Without the system's cache FFCV reads whole pages ahead and keeps only what it still needs,
            for files larger than memory: rows then come fastest in the order of the file.
        batches_ahead: FFCV's: batches that wait, rendered, for the one who iterates.

    Attributes:
        waited: seconds that `render` has waited for decoded batches so far.

    Raises:
        RecipeError: for views that mix images, without the system's cache: their partners are anywhere in the file.
    """

    def __init__(
        self,
        beton: Beton,
        views: ViewRecipe | None,
        size: int,
        batch_size: int,
        workers: int,
        device: torch.device,
        crop_pct: float = 1.0,
        os_cache: bool = True,
        batches_ahead: int = 3,
    ) -> None:
        self._mixes = views is not None and views.mixes
        if self._mixes and not os_cache:
            raise RecipeError("views: expected os_cache: true for mixup and cutmix, found false; set one of them off")
        self._device, self._beton = device, beton
        self._parameters = view_parameters(views, center_fraction(size, crop_pct))
        self._size, self.batch_size = size, batch_size
        self._workers = workers
        self._os_cache, self._batches_ahead = os_cache, batches_ahead
        self._loaders: dict[int, Loader] = {}
        self.waited = 0.0

    def render(self, rows: NDArray[np.int64], views: NDArray[np.int64] | int) -> Generator[Batch, None, None]:
        """Batches of the pairs (rows[i], views[i]) in their order; the last one may be smaller.

        With views of shape [N, G], G views of each image, which is decoded once for all of them.

        Args:
            rows: of the packed images, int64 [N].
            views: the numbers of their views, int64 [N] or [N, G]; one number is that of all.

        Raises:
            DataError: when images have changed or do not decode, naming keys.
            RuntimeError: when the thread died.
        """
        rows, numbers = np.array(rows, np.int64), np.array(views, np.int64)
        several = numbers.ndim == 2
        numbers = numbers if several else np.broadcast_to(numbers, len(rows))[:, None].copy()
        assert len(numbers) == len(rows), f"views of {len(numbers)} rows for {len(rows)}"
        assert ((rows >= 0) & (rows < len(self._beton))).all(), "rows are not checked where they are used"
        partners = self._partners(rows, numbers)
        epoch = _ViewEpoch(self._loader(numbers.shape[1]), rows, numbers, partners, self._workers)
        start = 0
        try:
            while output := self._next(epoch):
                end = start + len(output.pixels)
                part = slice(start, end)
                batch = self._batch(output, rows[part], partners[part], several)
                with _copied(self._device):
                    yield batch
                start = end
        except DecodeError as error:
            keys = [self._beton.manifest.keys[row] for row in error.rows]
            raise DataError(
                f"{self._beton.path}: expected the images that were packed, found {len(keys)} that have changed, "
                f"such as {', '.join(keys[:3])}; copy the file again, or pack again"
            ) from None
        finally:
            epoch.close()

    def _next(self, epoch: "_ViewEpoch") -> "_Output | None":
        started = time.perf_counter()
        output = next(epoch, (None,))[0]
        self.waited += time.perf_counter() - started
        return output

    def _partners(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row that each view is mixed with, -1 where none is: int64 [B, G]."""
        if not self._mixes:
            return np.full(views.shape, -1)
        return find_partners(self._parameters, self._beton.keys[rows], self._beton.key_order, views)

    def _batch(self, output: "_Output", rows: NDArray, partners: NDArray, several: bool) -> Batch:
        labels = self._beton.labels
        tensors = [torch.from_numpy(output.pixels).movedim(-1, -3)]
        if self._mixes:
            partner_labels = labels[np.where(partners < 0, rows[:, None], partners)]
            tensors += [torch.from_numpy(partner_labels), torch.from_numpy((output.lams / ONE).astype(np.float32))]
        if not several:
            tensors = [tensor.squeeze(1) for tensor in tensors]
        tensors.append(torch.from_numpy(labels[rows]))
        images, *mixed, labels = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        return Batch(images, rows, labels, Mixed(*mixed) if mixed else None)

    def _loader(self, views: int) -> Loader:
        """FFCV's loader for this number of views of each image; its memory has a fixed shape."""
        if views not in self._loaders:
            decoder = _ViewDecoder(self._beton, self._parameters, (views, self._size, self._size, 3), self._workers)
            self._loaders[views] = make_loader(
                self._beton.path,
                {"image": [decoder], "label": None},
                self.batch_size,
                self._os_cache,
                self._batches_ahead,
            )
        return self._loaders[views]


class _Output(NamedTuple):
    """What the decoder gives for a batch: uint8 [B, G, S, S, 3] and int64 [B, G]."""

    pixels: NDArray[np.uint8]
    lams: NDArray[np.int64]


class _ViewDecoder(ImageDecoder):
    """The FFCV operation.

    Its memory is, for each batch slot: pixels, view numbers and partners (filled by _ViewEpoch), lams, rows that
    failed.
    """

    def __init__(self, beton: Beton, parameters: ViewParameters, shape: tuple[int, ...], workers: int) -> None:
        super().__init__()
        self._columns = (beton.keys, beton.crc32, beton.offsets, beton.lengths, beton.heights, beton.widths)
        self._parameters, self._shape, self._workers = parameters, shape, workers

    def declare_state_and_memory(self, previous_state):  # pyright: ignore[reportIncompatibleMethodOverride]
        views = self._shape[:1]
        numbers = (AllocationQuery(shape, np.dtype("i8")) for shape in (views, views, views, ()))
        pixels = AllocationQuery(self._shape, np.dtype("u1"))
        return replace(previous_state, jit_mode=True, shape=self._shape, dtype=np.dtype("u1")), (pixels, *numbers)

    def generate_code(self):
        columns, parameters, workers = self._columns, self._parameters, self._workers

        def decode(rows, memory, metadata, storage_state):
            pixels, views, partners, lams, failed = memory
            pool, (data, _, _, *slots) = storage_state  # data: the mapped file, or pages in memory [count, bytes]
            page_bits = data.shape[1].bit_length() - 1 if slots else 0
            where = data.ctypes.data, slots[0] if slots else NO_SLOTS, page_bits
            work = (rows.astype(np.int64), views, partners, columns, *where, parameters, pixels, lams, failed)
            parts = min(len(rows), workers * PARTS_A_WORKER)
            with _patience():
                list(pool.map(lambda part: render(part, parts, *work), range(parts)))
            return _Output(pixels, lams)

        return decode


class _ViewEpoch(Epoch):
    """View numbers go in, and rows that failed come out as an error."""

    def __init__(self, loader: Loader, rows: NDArray, views: NDArray, partners: NDArray, workers: int) -> None:
        self._views, self._partners = views, partners
        super().__init__(loader, rows, workers)  # starts the thread, which reads them

    def run_pipeline(self, b_ix, batch_indices, batch_slot, cuda_event):
        [(_, views, partners, _, failed)] = self.memory_allocations["operation"].values()
        count, start = len(batch_indices), b_ix * self.loader.batch_size
        views[batch_slot][:count] = self._views[start : start + count]
        partners[batch_slot][:count] = self._partners[start : start + count]
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        rows = failed[batch_slot][:count]
        if (rows >= 0).any():
            raise DecodeError(np.unique(rows[rows >= 0]))
        return result


@contextmanager
def _copied(device: torch.device) -> Iterator[None]:
    """Wait, at the end, for the copies to a device that began before.

    Only then may the decoder write to their memory again, or give it back.
    """
    if device.type == "cpu":
        yield
        return
    copies = torch.Event(device, blocking=True)
    copies.record()
    try:
        yield
    finally:
        copies.synchronize()


@contextmanager
def _patience() -> Iterator[None]:
    """Say why the first batch after an installation or an upgrade takes its time."""
    text = "softshard: compiling the decoder, once; this takes about half a minute"
    if render.signatures:
        yield
        return
    notice = threading.Timer(NOTICE_SECONDS, print, (text,), {"file": sys.stderr})
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
