"""Stock FFCV still has the faults that the bridge works around. A test that fails here says that upstream has mended
one: the piece of the bridge that names it can go."""

import gc
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numba
import numpy as np
import pytest
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.reader import Reader
from helpers.small_packs import edit

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.ffcv_bridge import ImageDecoder, kept_threads, make_loader, uncompiled

ROWS = np.arange(20, dtype=np.uint64)


def in_a_new_process(script: str, *words: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


class Failing(SimpleRGBImageDecoder):
    def generate_code(self):
        def decode(*_):
            raise ValueError("inside an operation")

        return decode


@pytest.fixture
def whole_images(digits: Beton) -> Loader:
    return stock_loader(digits, SimpleRGBImageDecoder())


def stock_loader(beton: Beton, decoder: Operation) -> Loader:
    """A loader of FFCV's own epochs, each with more batches than wait ahead."""
    return make_loader(beton.path, {"image": [decoder], "label": None}, 2, os_cache=True, batches_ahead=1)


@pytest.fixture
def epochs() -> Iterator[list[EpochIterator]]:
    """Stock epochs, ended after the test."""
    made: list[EpochIterator] = []
    with kept_threads():
        yield made
        for epoch in made:
            epoch.terminate_event.set()
            while not epoch.output_queue.empty():
                epoch.output_queue.get_nowait()
            epoch.join(10)


# What it sets for the whole process

NUMBERS_OF_THREADS = """
import numba, torch
numba.get_num_threads()
torch.set_num_threads(3)
import ffcv
print(torch.get_num_threads(), numba.get_num_threads())
"""

COUNTED_DICTIONARIES = """
import numba.typed
made = []
numba.typed.Dict = lambda: made.append({}) or made[-1]
import ffcv
print(len(made))
"""

UNCHANGED = """
import os, sys
import numba, numba.typed, torch
import cv2  # which FFCV imports, sets paths for its own windows
numba.get_num_threads()
torch.set_num_threads(3)
def state():
    kinds = numba.uint8[::1].mutable, numba.uint64[::1].mutable, numba.typed.Dict
    return torch.get_num_threads(), numba.get_num_threads(), *kinds
before, environment = state(), dict(os.environ)
__import__(sys.argv[1])
assert state() == before, (before, state())
assert dict(os.environ) == environment, {name for name, _ in os.environ.items() ^ environment.items()}
"""


def test_importing_it_sets_numbers_of_threads() -> None:
    assert in_a_new_process(NUMBERS_OF_THREADS) == ["1", "1"]


def test_importing_it_compiles_dictionaries() -> None:
    assert in_a_new_process(COUNTED_DICTIONARIES) == ["1"]


@pytest.mark.parametrize("module", ["images.beton", "images.ffcv_bridge", "views.loader"])
def test_importing_this_project_changes_nothing(module: str) -> None:
    in_a_new_process(UNCHANGED, f"softshard.pipeline.{module}")


@pytest.mark.parametrize("call", [Loader.__init__, Loader.__iter__, EpochIterator.run])
def test_loaders_and_epochs_set_numbers_of_threads(call) -> None:
    assert "Compiler.set_num_threads(" in inspect.getsource(call)


def test_a_loader_makes_numbas_byte_arrays_immutable(digits: Beton) -> None:
    byte_array = numba.uint8[::1]
    assert byte_array.mutable
    try:
        _ = OSCacheManager(Reader(str(digits.path))).state_type
        assert not byte_array.mutable
    finally:
        byte_array.mutable = True


# How it compiles


def test_operations_are_compiled_in_each_process() -> None:
    compiled: Any = Compiler.compile(lambda x: x)
    assert type(compiled._cache).__name__ == "NullCache"
    assert compiled.targetoptions["fastmath"]


def test_compiling_is_switched_for_the_whole_process() -> None:
    with uncompiled():
        assert not Compiler.is_enabled
        assert "is_enabled" in vars(Compiler)
    assert Compiler.is_enabled


def test_parallel_operations_use_numbas_threading_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "num_threads", 2)

    def operation(x):
        return x

    operation.is_parallel = True  # pyright: ignore[reportFunctionMemberAccess]
    assert Compiler.compile(operation).targetoptions["parallel"]


def test_a_decoder_of_another_class_is_not_the_decoder() -> None:
    other = type("Decoder", (Operation,), dict.fromkeys(Operation.__abstractmethods__))
    for decoder, kept in ((other(), False), (type("Subclass", (ImageDecoder,), {})(), True)):
        spec = PipelineSpec("image", transforms=[decoder])
        spec.accept_decoder(SimpleRGBImageDecoder, "image")
        assert (spec.decoder is decoder) == kept


# Its epochs


def test_an_exception_leaves_the_one_who_waits_without_an_answer(
    digits: Beton, epochs: list[EpochIterator], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    epochs.append(EpochIterator(stock_loader(digits, Failing()), ROWS))  # pyright: ignore[reportArgumentType]
    epochs[0].join(10)
    assert [failure.exc_type for failure in failures] == [ValueError]
    assert not epochs[0].is_alive()
    assert epochs[0].output_queue.empty(), "next(epoch) would wait for ever"


def test_an_epoch_that_is_left_early_stays(whole_images: Loader, epochs: list[EpochIterator]) -> None:
    def leave_early() -> None:
        for _ in EpochIterator(whole_images, ROWS):  # pyright: ignore[reportArgumentType]
            break

    leave_early()
    gc.collect()
    epochs += [thread for thread in threading.enumerate() if type(thread) is EpochIterator]
    assert len(epochs) == 1


def test_an_epoch_gives_back_its_memory_each_time_it_is_closed(
    whole_images: Loader, epochs: list[EpochIterator]
) -> None:
    epochs.append(EpochIterator(whole_images, ROWS))  # pyright: ignore[reportArgumentType]
    epochs[0].memory_context = Mock(wraps=epochs[0].memory_context, __exit__=Mock())
    epochs[0].close()
    epochs[0].__del__()
    assert epochs[0].memory_context.__exit__.call_count == 2


def test_the_thread_does_not_choose_its_device() -> None:
    """What that does is seen on a machine with several GPUs alone."""
    assert "set_device" not in inspect.getsource(EpochIterator)


# What the loader and the opening of files do themselves


def test_a_damaged_image_is_not_noticed(digits: Beton, tmp_path: Path, epochs: list[EpochIterator]) -> None:
    copy = tmp_path / "digits.beton"
    copy.write_bytes(digits.path.read_bytes())
    edit(copy, int(digits.offsets[0]), b"no JPEG")
    loader = make_loader(copy, {"image": [SimpleRGBImageDecoder()], "label": None}, 2, os_cache=True, batches_ahead=1)
    epochs.append(EpochIterator(loader, ROWS))  # pyright: ignore[reportArgumentType]
    [pixels] = next(epochs[0])
    assert pixels.shape == (2, 28, 28, 3)


def test_a_truncated_file_is_not_noticed(digits: Beton, tmp_path: Path) -> None:
    copy = tmp_path / "digits.beton"
    copy.write_bytes(digits.path.read_bytes()[:-24])
    assert Reader(str(copy)).num_samples == len(digits)
