"""The loader: rows and view numbers in, batches of pixels out, rendered by one FFCV decoder in a background thread.

FFCV by itself ignores the JPEG decoder's return code, waits for ever when its thread dies, and leaks the thread and its
buffers when an epoch is left early. Here a return code, a wrong checksum or an exception becomes an error that names
the samples, a dead thread is noticed, and leaving the loop by any way closes the epoch.
"""

from softshard.pipeline.images.beton import (  # imports ffcv first, and undoes what that does to torch
    Beton,
    kept_threads,
)

# isort: split
import queue
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from numpy.typing import NDArray

from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.pipeline.views.batch import Batch, Mixed
from softshard.pipeline.views.kernels.rng import ONE
from softshard.pipeline.views.parameters import ViewParameters, center_fraction, view_parameters
from softshard.pipeline.views.render import find_partners, render

POLL_SECONDS, NOTICE_SECONDS = 0.2, 3.0
NO_SLOTS = np.zeros(1, np.uint32)
PARTS_A_WORKER = 4  # a batch is dealt in more parts than threads, so that none waits long for the others
_BUILDING = threading.Lock()


class ViewLoader:
    """Renders any list of (row, view) pairs of a .beton at one output size.

    views: the recipe, or None for a loader that only renders the center view (validation);
    workers: decoding threads; crop_pct: timm's, for the center view;
    waited: seconds that `render` has waited for decoded batches so far;
    os_cache, batches_ahead: FFCV's. Without the system's cache FFCV reads whole pages ahead and keeps only what it
    still needs, for files larger than memory: rows then come fastest in the order of the file.

    Raises RecipeError for views that mix images, without the system's cache: their partners are anywhere in the file.
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
        """Batches of the pairs (rows[i], views[i]) in their order; the last one may be smaller. With views of shape
        [N, G], G views of each image, which is decoded once for all of them.

        Raises DataError naming keys when images have changed or do not decode, RuntimeError when the thread died.
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
                copied = None if self._device.type == "cpu" else torch.Event(self._device, blocking=True)
                if copied:
                    copied.record()
                try:
                    yield batch
                finally:
                    if copied:
                        copied.synchronize()  # only now may the decoder write to this memory again, or give it back
                start = end
        except _DecodeError as error:
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
            with _uncompiled(), kept_threads():
                self._loaders[views] = Loader(
                    str(self._beton.path),
                    self.batch_size,
                    num_workers=1,  # FFCV's own code does no work
                    os_cache=self._os_cache,
                    order=OrderOption.SEQUENTIAL,
                    drop_last=False,
                    seed=0,
                    batches_ahead=self._batches_ahead,
                    pipelines={"image": [decoder], "label": None},  # pyright: ignore[reportArgumentType]
                )
        return self._loaders[views]


class _Output(NamedTuple):
    """What the decoder gives for a batch: uint8 [B, G, S, S, 3] and int64 [B, G]."""

    pixels: NDArray[np.uint8]
    lams: NDArray[np.int64]


class _ViewDecoder(SimpleRGBImageDecoder):
    """The FFCV operation. Its memory is, for each batch slot: pixels, view numbers and partners (filled by
    _ViewEpoch), lams, rows that failed."""

    def __init__(self, beton: Beton, parameters: ViewParameters, shape: tuple[int, ...], workers: int) -> None:
        super().__init__()
        self._columns = (beton.keys, beton.crc32, beton.offsets, beton.lengths, beton.heights, beton.widths)
        self._parameters, self._shape, self._workers = parameters, shape, workers

    def declare_state_and_memory(self, previous_state):
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


class _DecodeError(Exception):
    def __init__(self, rows: NDArray) -> None:
        super().__init__(rows)
        self.rows = rows


class _ViewEpoch(EpochIterator):
    """FFCV's epoch thread: view numbers go in, failures and exceptions come out, and the end is the end."""

    def __init__(self, loader: Loader, rows: NDArray, views: NDArray, partners: NDArray, workers: int) -> None:
        self._views, self._partners, self._workers, self._error = views, partners, workers, None
        self._device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        super().__init__(loader, rows.astype(np.uint64))  # pyright: ignore[reportArgumentType]  # starts the thread

    def run(self) -> None:
        """FFCV's own loop sets torch's number of threads, and does not look whether it should end while it has room."""
        try:
            if self._device_index is not None:
                torch.accelerator.set_device_index(self._device_index)  # threads begin with the first one
            # Threads of the epoch's own: numba's layers do not survive a fork, or abort on concurrent use.
            with ThreadPoolExecutor(self._workers, "decode") as pool:
                self.storage_state = (pool, self.storage_state)
                for number, rows in enumerate(self.iter_ixes):
                    slot = number % (self.loader.batches_ahead + 2)
                    self._put((slot, self.run_pipeline(number, rows, slot, None)))
                    if self.terminate_event.is_set():
                        return
            self._put(None)
        except BaseException as error:
            self._error = error

    def _put(self, result) -> None:
        while not self.terminate_event.is_set():
            with suppress(queue.Full):
                self.output_queue.put(result, timeout=POLL_SECONDS)
                return

    def run_pipeline(self, b_ix, batch_indices, batch_slot, cuda_event):
        [(_, views, partners, _, failed)] = self.memory_allocations["operation"].values()
        count, start = len(batch_indices), b_ix * self.loader.batch_size
        views[batch_slot][:count] = self._views[start : start + count]
        partners[batch_slot][:count] = self._partners[start : start + count]
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        rows = failed[batch_slot][:count]
        if (rows >= 0).any():
            raise _DecodeError(np.unique(rows[rows >= 0]))
        return result

    def __next__(self):
        while True:
            try:
                result = self.output_queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if self.is_alive() or not self.output_queue.empty():
                    continue
                if isinstance(self._error, _DecodeError):
                    raise self._error from None
                raise RuntimeError("the decoding thread died") from self._error
        if result is None:
            raise StopIteration
        return result[1]

    def close(self) -> None:
        """End the thread and let go of its memory, whether or not the epoch is over."""
        self.terminate_event.set()
        with suppress(queue.Empty):
            self.output_queue.get_nowait()  # it may be waiting to put a result into a full queue
        self.join()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)

    def __del__(self) -> None:
        """FFCV closes here; this epoch is closed by ViewLoader.render, in the thread that used it."""


@contextmanager
def _patience():
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


@contextmanager
def _uncompiled():
    """Build an FFCV pipeline that calls `render`, which numba caches on disk, instead of compiling code around it. One
    at a time: the switch is a global of FFCV's. Its loader also makes numba's one type of byte arrays immutable, which
    other compiled code then no longer finds."""
    byte_array = numba.uint8[::1]
    with _BUILDING:
        Compiler.set_enabled(False)
        try:
            yield
        finally:
            Compiler.set_enabled(True)
            byte_array.mutable = True
