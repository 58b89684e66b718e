"""The network that trains: built from the recipe, with the normalization of its pixels inside."""

from pathlib import Path
from typing import TYPE_CHECKING

import timm
import timm.data
import torch
from torch import Tensor, nn

from softshard.teachers.weights import load_weights, read_weights
from softshard.trainer.students import build_student, expand
from softshard.trainer.students.weights import REMEDY, errors_of_weights

if TYPE_CHECKING:  # the class is of use without recipes, and what reads them
    from softshard.trainer.recipe import TrainRecipe


class Student(nn.Module):
    """A network with the normalization of its pixels: uint8 [B, 3, S, S] -> logits [B, classes].

    Weights are those of `network`, a plain model or its expanded form; mean and std are timm's for the model, and
    ImageNet's for torchvision's models.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        settings = timm.data.resolve_model_data_config(network)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(1, 3, 1, 1) * 255, persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 pixels as the network takes them."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] of uint8 pixels [N, 3, H, W]."""
        return self.network(self.normalized(images))


def make_student(recipe: "TrainRecipe", weights: Path | None = None) -> Student:
    """The student of a recipe.

    Args:
        recipe: Names the model, its branches, its size, and the weights that it starts from.
        weights: A file of weights to take instead (.safetensors, of the student as trained).

    Returns:
        The student on the CPU, in channels_last.

    Raises:
        RecipeError: An unknown model, or branches that it cannot have.
        DataError, FormatError: Weights that do not fit or cannot be read.
    """
    torch.manual_seed(recipe.seed)
    wanted = recipe.student
    start = {} if weights else {"pretrained": wanted.pretrained, "checkpoint": wanted.checkpoint}
    network = build_student(wanted.model, wanted.num_classes, library=wanted.library, **start)
    if wanted.expand:
        example = torch.zeros(1, 3, recipe.data.size, recipe.data.size)
        network = expand(network, example, **wanted.expand.model_dump())
    if weights:
        with errors_of_weights():
            load_weights(network, read_weights(weights), str(weights), "this recipe's student", REMEDY)
    return Student(network).to(memory_format=torch.channels_last)
