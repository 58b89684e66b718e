"""A run's folder: recipe.yaml, classes.txt, metrics.jsonl, last.pt (everything to go on with), model.safetensors (the
result, written at the end)."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from pipeline.errors import DataError, FormatError
from pipeline.files import atomic_path, write_atomically
from pipeline.recipe_file import first_difference, load_recipe, save_recipe
from trainer.recipe import TrainRecipe

RECIPE, CLASSES, CHECKPOINT, METRICS, WEIGHTS = (
    "recipe.yaml",
    "classes.txt",
    "last.pt",
    "metrics.jsonl",
    "model.safetensors",
)
HARMLESS = {"output": True, "data": {"workers"}}  # keys that do not change what is computed


def open_run(recipe: TrainRecipe, classes: Sequence[str]) -> Path:
    """The run folder; made with the resolved recipe when new. Raises DataError when it belongs to another recipe."""
    folder = Path(recipe.output)
    saved = folder / RECIPE
    if not saved.exists():
        write_atomically(folder / CLASSES, "".join(f"{name}\n" for name in classes).encode())
        save_recipe(recipe, saved)
    before = load_recipe(TrainRecipe, saved)
    difference = first_difference(recipe.model_dump(exclude=HARMLESS), before.model_dump(exclude=HARMLESS))
    if difference:
        raise DataError(
            f"{folder}: expected a run of this recipe, found one of another: {difference}; name another output"
        )
    return folder


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace last.pt, then metrics.jsonl; `state["metrics"]` has one dictionary for each finished epoch."""
    with atomic_path(folder / CHECKPOINT) as partial:
        torch.save(state, partial)
    write_atomically(folder / METRICS, "".join(json.dumps(line) + "\n" for line in state["metrics"]).encode())


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None. Only tensors and plain values are read; pickled code is refused (FormatError)."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{path}: expected a checkpoint of tensors and plain values, found: {reason}; "
            "delete it to start this run again, or name another output"
        ) from None


def save_weights(folder: Path, network: nn.Module) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as partial:
        safetensors.torch.save_file(tensors, partial)
