"""What the stages that run under `accelerate launch` share: the Accelerator, the start-up line, stop signals."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from softshard.pipeline.runtime.errors import DataError

# What Accelerate's launcher sets for models that are spread over devices, and its options.
MODEL_PARALLEL_OPTIONS = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}
REPEATED_SECONDS = 2.0
STOPPING = "stopping after what is being done now, whose result is kept; Ctrl-C once more ends at once"


def make_accelerator(stage: str, precision: str, **options: Any) -> Accelerator:
    """The Accelerator of this process; prints one line that says how many processes run, where and in which precision.

    precision: the recipe's; options: Accelerate's own. Raises DataError when the launcher asks for another precision
    than the recipe, for a compiler or for models in parts, and when it started more processes than Accelerate knows of:
    each would believe that it is alone and do all of the work.
    """
    _check_launcher(stage, precision)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **{"mixed_precision": "no", **options})
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise DataError(
            f"{stage}: expected {launched} processes, as the launcher says, found {accelerator.num_processes}; "
            "start them with `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`"
        )
    plural = "" if launched == 1 else "es"
    accelerator.print(f"{stage}: {launched} process{plural} on {accelerator.device.type}, {precision}")
    return accelerator


def _check_launcher(stage: str, precision: str) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise DataError(
            f"{stage}: expected no --mixed_precision, because results depend on it, found {asked}; "
            f"set `precision: {asked}` in the recipe"
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise DataError(
            f"{stage}: expected no --dynamo_backend, because results depend on it, found {compiler}; "
            "set `compile: true` in the recipe"
        )
    for name, option in MODEL_PARALLEL_OPTIONS.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise DataError(
                f"{stage}: expected a whole model on each device, found {option}; start it without, with --multi_gpu"
            )


class CollectiveFlags:
    """What any of the processes asks for, known to all of them after the same step.

    The question of a step travels while the next one is computed, over gloo and never through the accelerator's queue,
    so that nobody waits for it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *wishes: bool, now: bool = False) -> list[bool]:
        """For each wish, whether a process had it one call ago; with `now`, which all processes pass or none, whether
        one has it now or had it then. A process alone gets its wishes."""
        if self._group is None:
            return list(wishes)
        granted = self._answer(len(wishes))
        tensor = torch.tensor(wishes, dtype=torch.int32)
        self._asked = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return [one or two for one, two in zip(granted, self._answer(len(wishes)), strict=True)] if now else granted

    def _answer(self, count: int) -> list[bool]:
        if self._asked is None:
            return [False] * count
        tensor, work = self._asked
        work.wait()
        self._asked = None
        return [bool(value) for value in tensor]


class StopSignal:
    """While the context is open, SIGINT and SIGTERM set `received` instead of ending the process, so that the work can
    end after the current step. Ctrl-C a second time ends it at once; signals that follow each other closely are one,
    because launchers and batch systems repeat those that a terminal has sent to all processes."""

    received = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"\n{signal.Signals(number).name}: {STOPPING}\n".encode())  # print is not for handlers
        elif number == signal.SIGINT and now - self._first > REPEATED_SECONDS:
            raise KeyboardInterrupt
