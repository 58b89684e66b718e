"""The loader: rows and view numbers in, batches of pixels out, rendered by one FFCV decoder in a background thread.

FFCV by itself ignores the JPEG decoder's return code, waits for ever when its thread dies, and leaks the thread and its
buffers when an epoch is left early. Here a return code, a wrong checksum or an exception becomes an error that names
the samples, a dead thread is noticed, and leaving the loop by any way closes the epoch.
"""

from pipeline.beton import Beton, kept_threads  # imports ffcv first, and undoes what that does to torch

# isort: split
import ctypes
import queue
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from ffcv import libffcv
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from numba.core import config
from numba.np.ufunc.parallel import threading_layer
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError
from pipeline.recipe import ViewRecipe
from pipeline.views import ViewParameters, centre_fraction, render, view_parameters

llvm.add_symbol("softshard_imdecode", ctypes.cast(libffcv.lib.imdecode, ctypes.c_void_p).value)
llvm.add_symbol("softshard_crc32", ctypes.cast(ctypes.CDLL("libz.so.1").crc32, ctypes.c_void_p).value)
llvm.add_symbol("softshard_resize", ctypes.cast(libffcv.lib.resize, ctypes.c_void_p).value)

POLL_SECONDS = 0.2


class Batch(NamedTuple):
    """images: uint8 [B, 3, S, S] (channels_last) and labels: int64 [B], both on the loader's device; rows: int64 [B].

    On the CPU `images` is the loader's own memory: valid until the next batch is asked for.
    """

    images: Tensor
    rows: NDArray[np.int64]
    labels: Tensor


class ViewLoader:
    """Renders any list of (row, view) pairs of a .beton at one output size.

    views: the recipe, or None for a loader that only renders the centre view (validation);
    workers: decoding threads, at most one for each core; crop_pct: timm's, for the centre view.
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
    ) -> None:
        _require_tbb()
        self._device = device
        parameters = view_parameters(views, centre_fraction(size, crop_pct))
        workers = min(workers, config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
        self._decoder = _ViewDecoder(beton, parameters, size, workers)
        self._beton = beton
        with _uncompiled(), kept_threads():
            self._loader = Loader(
                str(beton.path),
                batch_size,
                num_workers=1,  # FFCV's own code does no work
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                drop_last=False,
                seed=0,
                pipelines={"image": [self._decoder], "label": None},  # pyright: ignore[reportArgumentType]
            )

    def render(self, rows: NDArray[np.int64], views: NDArray[np.int64] | int) -> Iterator[Batch]:
        """Batches of the pairs (rows[i], views[i]) in their order; the last one may be smaller.

        Raises DataError naming keys when images have changed or do not decode, RuntimeError when the thread died.
        """
        rows, views = (np.array(part, np.int64) for part in np.broadcast_arrays(rows, views))
        assert ((rows >= 0) & (rows < len(self._beton))).all(), "rows are not checked where they are used"
        epoch = _ViewEpoch(self._loader, rows, views)
        start = 0
        try:
            for (pixels,) in epoch:
                batch_rows = rows[start : start + len(pixels)]
                start += len(pixels)
                images, labels = (
                    torch.from_numpy(pixels).permute(0, 3, 1, 2),
                    torch.from_numpy(self._beton.labels[batch_rows]),
                )
                images, labels = (tensor.to(self._device, non_blocking=True) for tensor in (images, labels))
                copied = None if self._device.type == "cpu" else torch.Event(self._device)
                if copied:
                    copied.record()
                yield Batch(images, batch_rows, labels)
                if copied:
                    copied.synchronize()  # only now may the decoder write to this memory again
        except _DecodeError as error:
            keys = [self._beton.manifest.keys[row] for row in error.rows]
            raise DataError(
                f"{self._beton.path}: expected the images that were packed, found {len(keys)} that have changed, "
                f"such as {', '.join(keys[:3])}; copy the file again, or pack again"
            ) from None
        finally:
            epoch.close()


class _ViewDecoder(SimpleRGBImageDecoder):
    """The FFCV operation. Its memory is, for each batch slot: pixels, view numbers (filled by _ViewEpoch), statuses."""

    def __init__(self, beton: Beton, parameters: ViewParameters, size: int, workers: int) -> None:
        super().__init__()
        self._columns = (beton.keys, beton.crc32, beton.offsets, beton.lengths, beton.heights, beton.widths)
        self._parameters, self._size, self._workers = parameters, size, workers

    def declare_state_and_memory(self, previous_state):
        shape = (self._size, self._size, 3)
        pixels, views, status = (AllocationQuery(s, np.dtype(t)) for s, t in ((shape, "u1"), ((), "i8"), ((), "i4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")), (pixels, views, status)

    def generate_code(self):
        columns, parameters, workers = self._columns, self._parameters, self._workers

        def decode(rows, memory, metadata, storage_state):
            pixels, views, status = memory
            numba.set_num_threads(workers)
            render(rows, views, *columns, storage_state[0], parameters, workers, pixels, status)
            return pixels

        return decode


class _DecodeError(Exception):
    def __init__(self, rows: NDArray) -> None:
        super().__init__(rows)
        self.rows = rows


class _ViewEpoch(EpochIterator):
    """FFCV's epoch thread: view numbers go in, statuses and exceptions come out, and the end is the end."""

    def __init__(self, loader: Loader, rows: NDArray[np.int64], views: NDArray[np.int64]) -> None:
        self._views, self._error = views, None
        super().__init__(loader, rows.astype(np.uint64))  # pyright: ignore[reportArgumentType]  # starts the thread

    def run(self) -> None:
        """FFCV's own loop sets torch's number of threads, and does not look whether it should end while it has room."""
        try:
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
        [(_, views, status)] = self.memory_allocations["operation"].values()
        count, start = len(batch_indices), b_ix * self.loader.batch_size
        views[batch_slot][:count] = self._views[start : start + count]
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        failed = status[batch_slot][:count] != 0
        if failed.any():
            raise _DecodeError(batch_indices[failed])
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
def _uncompiled():
    """Build an FFCV pipeline that calls `render`, which numba caches on disk, instead of compiling code around it."""
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(True)


def _require_tbb() -> None:
    """Numba's own threading layer aborts on concurrent use, OpenMP's does not survive a fork."""
    layer = threading_layer()
    if layer != "tbb":
        raise DataError(
            f"numba: expected the threading layer tbb, found {layer}; `pip install tbb`, unset NUMBA_THREADING_LAYER"
        )
