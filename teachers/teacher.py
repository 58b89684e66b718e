"""A classifier with its own input size, mean, standard deviation and class count, and the error of all teachers."""

import difflib
import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


class TeacherError(Exception):
    """A teacher cannot be made or used: unknown name, unreadable weights, weights of another model, no logits."""


class Preprocessing(NamedTuple):
    """What a teacher was trained to see. `mean` and `std` are of pixels in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str  # of the resize before the crop: "bicubic", "bilinear"


class Teacher(nn.Module):
    """A classifier with its preprocessing: frozen, and always in eval mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, library: str, model: nn.Module, classes: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name, self.library, self.classes = name, library, classes
        self.size, mean, std, self.interpolation = preprocessing
        self.model = model.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever `mode` is: labels must not depend on dropout or on the rest of the batch."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch of views and classify it.

        Args:
            images: uint8 [B, 3, size, size].

        Returns:
            logits, float32 [B, classes].

        Raises:
            TeacherError: the model has another input size, or gives anything but floating-point [B, classes].
        """
        try:
            logits = self.model((images.to(self.mean.dtype) - self.mean) / self.std)
        except AssertionError as error:  # timm's, about the input size
            raise TeacherError(
                f"teacher {self.name}: expected a model for {self.size} x {self.size} pixels, found: {error}; "
                "set `size` to the one it was made for, or to null"
            ) from None
        wanted = (len(images), self.classes)
        if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.shape == wanted):
            found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TeacherError(
                f"teacher {self.name}: expected floating-point logits {wanted}, found {found}; use a classifier"
            )
        return logits.float()

    def weights_digest(self) -> str:
        """Return BLAKE2b (16 bytes, in hexadecimal) over names, dtypes, shapes and bytes of the state dict."""
        state = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()


def unknown_name(model: str, expected: str, names: Iterable[str], listing: str) -> TeacherError:
    """Make the error for a name not among `names`: it tells the nearest, or `listing`, the call that lists all."""
    near = difflib.get_close_matches(model, list(names), n=3)
    hint = f"near: {', '.join(near)}" if near else f"{listing} lists them"
    return TeacherError(f"teacher: expected {expected}, found {model!r}; {hint}")
