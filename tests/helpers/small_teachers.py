"""What tests of teachers lam: small inputs and weights, models that misbehave."""

from pathlib import Path
from typing import Any

import safetensors.torch
import timm.data
import torch
from torch import Tensor, nn

from softshard.teachers.teacher import Preprocessing

IMAGENET = Preprocessing(8, timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD, "bicubic")


def save(model: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_model(model, str(path))
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def pixels(size: int, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


class Outputs(nn.Module):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Any:
        return self.outputs(images)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
