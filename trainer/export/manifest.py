"""export.json: what is in an exported folder, and how good it was found to be."""

import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softshard.pipeline.images.manifest import load_sealed, sealed
from softshard.pipeline.recipes.recipe import Model
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import write_atomically
from softshard.trainer.export.formats.contract import InputSpec
from softshard.trainer.recipe import StudentRecipe

MANIFEST = "export.json"


class Cost(Model):
    """What a network costs for one image."""

    parameters: int
    macs: int  # multiplications, each with its addition, of convolutions and matrix products


class FormatFigures(Model):
    """A format's file, and figures on the validation set: None where the exporting system cannot run the format."""

    file: str
    bytes: int
    opset: int | None = None
    top1: float | None = None  # percent
    agreement: float | None = None  # percent of predictions that are the folded student's
    difference: float | None = None  # the largest one of logits, relative to the largest logit


class Exported(Model):
    """The content of export.json."""

    format: Literal["softshard-export"] = "softshard-export"
    version: Literal[1] = 1
    student: StudentRecipe
    preprocessing: InputSpec
    label_names: tuple[str, ...]
    trained: Cost  # with branches, at preprocessing.size
    folded: Cost
    fold_difference: float  # the largest one of logits in float64, relative to the largest logit
    images: int  # that the formats were evaluated on
    formats: dict[str, FormatFigures]
    libraries: dict[str, str]


def cost_of(network: nn.Module, size: int) -> Cost:
    """Count parameters, and MACs at size x size pixels; leaves the network in evaluation mode."""
    parameter = next(network.parameters())
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return Cost(parameters=sum(p.numel() for p in network.parameters()), macs=counter.get_total_flops() // 2)


def save_exported(folder: Path, exported: Exported) -> None:
    """Write export.json, with the digest of its content."""
    write_atomically(folder / MANIFEST, json.dumps(sealed(exported), indent=2).encode())


def open_exported(folder: Path) -> Exported:
    """Read the export.json of a folder.

    Raises:
        DataError: the folder is no export.
        FormatError: its export.json was damaged or edited.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: expected an exported folder with {MANIFEST}, found none; make it with `softshard export`"
        )
    return load_sealed(Exported, path.read_bytes(), str(path), "export again")
