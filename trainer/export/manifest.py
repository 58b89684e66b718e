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
    """macs: multiplications (each with its addition) of convolutions and matrix products for one image."""

    parameters: int
    macs: int


class FormatFigures(Model):
    """On the validation set: top1 and agreement (predictions equal to the folded student's) in percent, difference: the
    largest one of logits, relative to the largest logit. None where the system that exported cannot run the format."""

    file: str
    bytes: int
    opset: int | None = None
    top1: float | None = None
    agreement: float | None = None
    difference: float | None = None


class Exported(Model):
    """trained, folded: the student with and without its branches, at preprocessing.size. fold_difference: the largest
    one of logits that folding makes in float64, relative to the largest logit. images: how many `formats` saw."""

    format: Literal["softshard-export"] = "softshard-export"
    version: Literal[1] = 1
    student: StudentRecipe
    preprocessing: InputSpec
    label_names: tuple[str, ...]
    trained: Cost
    folded: Cost
    fold_difference: float
    images: int
    formats: dict[str, FormatFigures]
    libraries: dict[str, str]


def cost_of(network: nn.Module, size: int) -> Cost:
    """Parameters, and MACs in evaluation mode at size x size pixels."""
    parameter = next(network.parameters())
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    return Cost(parameters=sum(p.numel() for p in network.parameters()), macs=counter.get_total_flops() // 2)


def save_exported(folder: Path, exported: Exported) -> None:
    write_atomically(folder / MANIFEST, json.dumps(sealed(exported), indent=2).encode())


def open_exported(folder: Path) -> Exported:
    """Raises DataError when the folder is no export, FormatError when its export.json was damaged or edited."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: expected an exported folder with {MANIFEST}, found none; make it with trainer export"
        )
    return load_sealed(Exported, path.read_bytes(), str(path), "export again")
