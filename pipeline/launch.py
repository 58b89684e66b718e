"""What both stages that run under `accelerate launch` share: the Accelerator, the start-up line, stop signals."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

from pipeline.errors import DataError


def make_accelerator(stage: str, precision: str | None = None) -> Accelerator:
    """The Accelerator of this process; prints one line that says how many processes run and where.

    precision: that of the recipe, where results depend on it; None: the launcher's `--mixed_precision`. Raises
    DataError when the launcher asks for another one than the recipe, and when it started more processes than Accelerate
    knows of: each would believe that it is alone and do all of the work.
    """
    accelerator = Accelerator(cpu=not _has_accelerator())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise DataError(
            f"{stage}: expected {launched} processes, as the launcher says, found {accelerator.num_processes}; "
            "start them with `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    asked = _precision(accelerator)
    if precision is not None and asked not in ("float32", precision):
        raise DataError(
            f"{stage}: expected no --mixed_precision, because labels depend on it, found {asked}; "
            f"set `precision: {asked}` in the recipe"
        )
    plural = "" if launched == 1 else "es"
    accelerator.print(f"{stage}: {launched} process{plural} on {accelerator.device.type}, {precision or asked}")
    return accelerator


class StopSignal:
    """While the context is open, SIGINT and SIGTERM set `received` instead of ending the process, so that the work can
    end after the current step. A second signal ends it at once."""

    received = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._before[signal.Signals(number)])


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def _precision(accelerator: Accelerator) -> str:
    return {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
