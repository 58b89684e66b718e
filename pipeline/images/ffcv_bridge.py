"""FFCV, and all that works around it. Nothing else imports it.

Each piece says what FFCV 1.0.2 does, and where that is reported. tests/pipeline/images/test_ffcv_bridge.py shows each
fault in stock FFCV: a test that fails there says that upstream has mended it, and that the piece can go.
Importing this changes nothing: what FFCV sets for the whole process is set back.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from numpy.typing import NDArray

POLL_SECONDS = 0.2
_BUILDING = threading.Lock()


@contextmanager
def kept_threads() -> Iterator[None]:
    """Set the numbers of threads of torch and numba back at the end.

    FFCV sets both, for the whole process, when it is imported, when it makes a loader and when an epoch begins; that
    was asked for in https://github.com/libffcv/ffcv/issues/13. numba does so to torch when it is asked for its own
    number for the first time (https://github.com/numba/numba/issues/9387), so torch's is read first.
    """
    torch_threads = torch.get_num_threads()
    numba_threads = numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


# FFCV keeps two constants in a dictionary of numba's, whose compilation at import takes seconds. Not reported.
with kept_threads(), patch("numba.typed.Dict", dict):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "AllocationQuery",
    "DecodeError",
    "Epoch",
    "FieldDescType",
    "HeaderType",
    "ImageDecoder",
    "IntField",
    "Loader",
    "RGBImageField",
    "Reader",
    "get_metadata_type",
    "kept_threads",
    "make_loader",
    "uncompiled",
]

# Put before an operation that is no subclass of this one, FFCV uses its own decoder in silence. Not reported.
ImageDecoder = SimpleRGBImageDecoder


@contextmanager
def uncompiled() -> Iterator[None]:
    """Make FFCV loaders whose operations are called as they are.

    FFCV compiles them anew in each process, with fastmath and without numba's cache on disk; operations here call
    functions that numba keeps. The switch is a global of FFCV's, so loaders are made one at a time. Making one also
    marks numba's one type of byte arrays as immutable, for the whole process, and other compiled code then no longer
    finds its functions. Neither is reported.
    """
    byte_array = numba.uint8[::1]
    with _BUILDING:
        Compiler.set_enabled(False)
        try:
            yield
        finally:
            Compiler.set_enabled(True)
            byte_array.mutable = True


def make_loader(
    path: Path, pipelines: Mapping[str, Any], batch_size: int, os_cache: bool, batches_ahead: int
) -> Loader:
    """FFCV's loader of a .beton, for epochs of any rows.

    `pipelines` has the operations of each field, and None for a field that is not wanted; the rest is FFCV's.
    """
    with uncompiled(), kept_threads():
        return Loader(
            str(path),
            batch_size,
            num_workers=1,  # FFCV's own code does no work
            os_cache=os_cache,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            seed=0,
            batches_ahead=batches_ahead,
            pipelines=pipelines,
        )


class DecodeError(Exception):
    """An operation could not decode these rows."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        super().__init__(rows)
        self.rows = rows


class Epoch(EpochIterator):
    """An epoch of FFCV's: its thread fills slots ahead of the one who iterates. Close it, whether it is over or not.

    Stock epochs
    - wait for ever when an operation raises, as in https://github.com/libffcv/ffcv/issues/372. Here DecodeError is
      raised as it is, anything else as the cause of a RuntimeError;
    - leave the thread and all slots behind when they are left early: https://github.com/libffcv/ffcv/issues/393 and
      345. Here `close` ends the thread and waits for it, and the thread looks whether it should end after each batch;
    - give back their memory each time they are closed, also from the garbage collector, in any thread. Not reported;
    - set the number of torch's threads: see `kept_threads`;
    - leave the thread on the first GPU: https://github.com/libffcv/ffcv/pull/190. Here it is the maker's;
    - work in parallel through numba's threading layers, of which workqueue aborts on concurrent use and the others do
      not survive a fork (https://github.com/libffcv/ffcv/issues/256). Here an epoch has threads of its own.

    An operation's storage_state is a pair: the pool of these threads, and what FFCV gives.
    """

    def __init__(self, loader: Loader, rows: NDArray[np.int64], workers: int) -> None:
        self._workers, self._error = workers, None
        self._device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        super().__init__(loader, rows.astype(np.uint64))  # pyright: ignore[reportArgumentType]  # starts the thread

    def run(self) -> None:
        """What the thread does: fill one slot after the other."""
        try:
            if self._device_index is not None:
                torch.accelerator.set_device_index(self._device_index)
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

    def __next__(self):
        while True:
            try:
                result = self.output_queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if self.is_alive() or not self.output_queue.empty():
                    continue
                if isinstance(self._error, DecodeError):
                    raise self._error from None
                raise RuntimeError("the decoding thread died") from self._error
        if result is None:
            raise StopIteration
        return result[1]

    def close(self) -> None:
        """End the thread and let go of its memory, whether or not the epoch is over."""
        self.terminate_event.set()
        with suppress(queue.Empty):
            self.output_queue.get_nowait()  # the thread may be waiting to put a result into a full queue
        self.join()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)

    def __del__(self) -> None:
        """FFCV closes here; this epoch is closed by the one who made it, in the thread that used it."""
