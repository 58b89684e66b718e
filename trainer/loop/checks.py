"""What can go wrong in training, said early, or with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.pipeline.runtime.files import write_atomically
from softshard.trainer.recipe import TrainRecipe

NOT_FINITE = "not_finite.txt"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def check_device(recipe: TrainRecipe) -> None:
    """Check the recipe against the device of this machine.

    Raises:
        RecipeError: It asks of a CPU what that cannot do.
    """
    if not torch.accelerator.is_available():
        if recipe.precision == "fp16":
            raise RecipeError("precision: expected float32 or bf16 on a CPU, found fp16; choose one of them")
        if recipe.sync_batch_norm:
            raise RecipeError("sync_batch_norm: expected false on a CPU, which torch cannot do it on, found true")


def check_batch(recipe: TrainRecipe, processes: int) -> None:
    """Check the global batch against the number of processes.

    Raises:
        RecipeError: It cannot be divided among processes and accumulation steps.
    """
    parts = processes * recipe.accumulation
    if recipe.batch_size % parts:
        raise RecipeError(
            f"batch_size: expected a multiple of {parts}, the number of processes ({processes}) times accumulation "
            f"({recipe.accumulation}), found {recipe.batch_size}; correct one"
        )


def check_batch_norm(recipe: TrainRecipe, student: nn.Module, processes: int) -> None:
    """Check that batch norm can have statistics of a process's part of a batch.

    Raises:
        RecipeError: The student has batch norms, and parts of a batch are single images.
    """
    if recipe.batch_size == processes * recipe.accumulation and any(
        isinstance(m, _BatchNorm) for m in student.modules()
    ):
        raise RecipeError(
            f"batch_size: expected at least 2 images in each part, for batch norm's statistics, found 1 of "
            f"{recipe.batch_size}; raise batch_size, or lower accumulation ({recipe.accumulation}) or the number of "
            f"processes ({processes})"
        )


def check_same_start(recipe: TrainRecipe, accelerator: Accelerator, update: int) -> None:
    """Check that all processes resume from the same update.

    Raises:
        DataError: They do not, as with a run folder on each machine.
    """
    starts: Any = accelerator.gather(torch.tensor([update], device=accelerator.device))
    if (starts != update).any():
        raise DataError(
            f"{recipe.output}: expected the same checkpoint in all processes, found updates "
            f"{', '.join(str(start) for start in starts.tolist())}; put output on a disk that all machines share"
        )


def not_finite(recipe: TrainRecipe, epoch: int, step: int, what: str, keys: list[str], write: bool) -> DataError:
    """The error for a loss or weights that are not finite.

    Args:
        recipe: Of the run.
        epoch: Counted from 0.
        step: Of the epoch, counted from 0.
        what: What was expected and found: "a finite loss, found nan".
        keys: Of the images of the batch.
        write: Whether this process writes the keys to a file.
    """
    path = Path(recipe.output) / NOT_FINITE
    if write:
        write_atomically(path, "".join(f"{key}\n" for key in keys).encode())
    return DataError(
        f"{recipe.output}: epoch {epoch + 1}, step {step + 1}: expected {what}; the keys of the {len(keys)} images are "
        f"in {path}; under another output, lower optimizer.lr ({recipe.optimizer.lr:g}), warm up longer "
        f"(schedule.warmup_epochs {recipe.schedule.warmup_epochs}), or set optimizer.clip_grad"
        + (", or precision: bf16" if recipe.precision == "fp16" else "")
    )


@contextmanager
def memory_advice(recipe: TrainRecipe, device: torch.device, processes: int) -> Iterator[None]:
    """Turn an allocation that fails in the block into an error that says which setting to change.

    Raises:
        DataError: Memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        images = recipe.batch_size // (processes * recipe.accumulation)
        half = ", or set precision: bf16" if recipe.precision == "float32" else ""
        raise DataError(
            f"{recipe.output}: expected room for {images} images of {recipe.data.size} pixels at once, found the "
            f"memory of {device} full; raise accumulation ({recipe.accumulation}), which leaves the global batches as "
            f"they are{half}, or lower batch_size ({recipe.batch_size})"
        ) from error
