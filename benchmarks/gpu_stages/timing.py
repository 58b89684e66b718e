"""Seconds and memory of a step on a device, and images for it."""

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]
OUT_OF_MEMORY = {"why": "out of memory"}
_SHORT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Cost(NamedTuple):
    """Of a step: median, least and largest milliseconds; MiB allocated at its peak (None on a CPU)."""

    ms: float
    least: float
    most: float
    mib: float | None


def random_images(
    images: int, pixels: int, device: torch.device | str, layout: torch.memory_format = torch.channels_last
) -> Tensor:
    """uint8 [B, 3, S, S], drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (images, 3, pixels, pixels)
    drawn = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    return drawn.contiguous(memory_format=layout)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def is_broken(device: str) -> bool:
    """Whether the device does nothing more for this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def cost(step: Step, device: str, rounds: int, warmup: int = 3) -> Cost:
    """Time a step `rounds` times after some that do not count. On a GPU the clock is that of the device's own events,
    and nothing waits between rounds."""
    for _ in range(warmup):
        step()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = _events(step, rounds) if device == "cuda" else _clock(step, rounds)
    mib = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return Cost(statistics.median(times), min(times), max(times), mib)


def _events(step: Step, rounds: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _clock(step: Step, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return times


def cost_or_why(make: Callable[[], Step], device: str, rounds: int) -> dict[str, Any]:
    """The cost of a step as figures, or OUT_OF_MEMORY where the device's memory does not suffice for it."""
    try:
        return cost(make(), device, rounds)._asdict()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    give_back(device)
    return dict(OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one that led to it (in a capture that was broken off), says that memory is short."""
    while error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _SHORT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def give_back(device: str) -> None:
    """Give the device's memory back that nothing holds any more. No place for an error of the device: whatever comes
    next meets it, too. Not while an exception is handled: its frames hold what they made."""
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
