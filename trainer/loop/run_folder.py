"""A run's folder.

recipe.yaml, classes.txt   what is trained
last.pt, previous.pt       the newest two checkpoints: everything to resume from
best.safetensors           the weights of the best validation so far
model.safetensors          the weights at the end
metrics.jsonl, curves.png  a line for each epoch, and what they look like
tensorboard/               for TensorBoard
"""

import fcntl
import json
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from softshard.pipeline.recipes.yaml_file import differences, load_recipe, save_recipe
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.runtime.files import atomic_path, write_atomically
from softshard.trainer.recipe import TrainRecipe

RECIPE, CLASSES, METRICS, CURVES = "recipe.yaml", "classes.txt", "metrics.jsonl", "curves.png"
LAST, PREVIOUS = "last.pt", "previous.pt"
LOCK = ".lock"
BEST, WEIGHTS = "best.safetensors", "model.safetensors"
# They do not change the global batches. Batch norm's statistics are those of a part of a batch, so that with another
# accumulation they are of more or fewer images.
CHANGEABLE_ON_RESUME = {
    "output": True,
    "logging": True,
    "evaluation": True,
    "checkpoint_minutes": True,
    "accumulation": True,
    "data": {"workers", "views"},  # which views there are is compared with the data itself
}

_logger = logging.getLogger(__name__)


def make_run(recipe: TrainRecipe, classes: Sequence[str]) -> None:
    """Make the run folder, with the resolved recipe when nothing has been trained there yet.

    What a killed process left unfinished is removed.
    """
    folder = Path(recipe.output)
    if not any((folder / name).exists() for name in (LAST, PREVIOUS, WEIGHTS)):
        write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in classes).encode())
        save_recipe(recipe, folder / RECIPE)
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def check_run(recipe: TrainRecipe) -> None:
    """Check that the run folder belongs to this recipe.

    Raises:
        DataError: It belongs to another one; all differences are named.
    """
    folder = Path(recipe.output)
    before = load_recipe(TrainRecipe, folder / RECIPE)
    found = list(
        differences(recipe.model_dump(exclude=CHANGEABLE_ON_RESUME), before.model_dump(exclude=CHANGEABLE_ON_RESUME))
    )
    if found:
        raise DataError(
            f"{folder}: expected a run of this recipe, found one of another: {'; '.join(found)}; name another output"
        )


def check_data(folder: Path, checkpoint: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run resumes with the data that it began with.

    Args:
        folder: Of the run, for messages.
        checkpoint: Its newest one.
        now: TrainingSet.identity of the data that the recipe names.

    Raises:
        DataError: The data differ.
        FormatError: The checkpoint does not say.
    """
    if "data" not in checkpoint:
        raise FormatError(
            f"{folder}: expected a checkpoint of this version of softshard, found one of another; name another output"
        )
    found = list(differences(checkpoint["data"], now))
    if found:
        raise DataError(
            f"{folder}: expected the data that this run began with, found other data under its name: "
            f"{'; '.join(found)}; bring it back, or name another output"
        )


@contextmanager
def run_lock(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """While the block runs, no other run works in the folder, which is made.

    Raises:
        DataError: Another one does; raised in all processes.
    """
    with ExitStack() as stack:
        free = _lock(folder, stack) if accelerator.is_main_process else True
        [free] = broadcast_object_list([free])
        if not free:
            raise DataError(
                f"{folder}: expected no other run at work in this folder, found one; wait for it, stop it, or name "
                "another output"
            )
        yield


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Whether this process has the folder now, until the stack unwinds or the process ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / LOCK).open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _logger.warning("%s: this disk has no locks (%s): see to it that no other run works here", folder, error)
    return True


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace last.pt, whose former content becomes previous.pt."""
    with atomic_path(folder / LAST) as partial:
        torch.save(state, partial)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none.

    When that is not the last one, it says so and removes the last one, which would otherwise become the one before at
    the next save. Only tensors and plain values are read, and every checksum in the file is checked; pickled code is
    not run.

    Raises:
        FormatError: There are checkpoints, but none is whole.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except FormatError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            _logger.warning("%s; resuming from %s", problem, path)
            (folder / LAST).unlink()
        return state
    if problems:
        raise FormatError(
            "; ".join(problems) + "; delete what is there to start this run again, or name another output"
        )
    return None


def save_metrics(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write metrics.jsonl anew: a line for each epoch."""
    write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the network's state_dict as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(path) as partial:
        safetensors.torch.save_file(tensors, partial)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not look at checksums
        if damaged:
            raise RuntimeError(f"a wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damage shows in many ways, in both libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"{path}: expected a checkpoint of tensors and plain values, found: {reason}") from None
