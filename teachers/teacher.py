"""A timm classifier with its own input size, mean, standard deviation and class count."""

import difflib
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.data
import torch
from safetensors import SafetensorError
from torch import Tensor, nn


class TeacherError(Exception):
    """The teacher cannot be made: unknown name, unreadable weights, weights of another model."""


class Teacher(nn.Module):
    """Frozen, in eval mode. forward: uint8 [B, 3, size, size] -> logits float32 [B, classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: nn.Module, size: int, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.name, self.size, self.classes = name, size, int(model.num_classes)  # pyright: ignore[reportArgumentType]
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.to(self.mean.dtype) - self.mean) / self.std).float()

    def weights_digest(self) -> str:
        """BLAKE2b over names, dtypes, shapes and bytes of the state dict."""
        state = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()


def load_teacher(model: str, checkpoint: str | None, size: int, classes: int) -> Teacher:
    """A timm model by name (`local-dir:PATH` for an exported folder), with timm's published weights, or with those of
    a local .safetensors or .pth file (read without unpickling code).

    Raises TeacherError: unknown name, weights that are missing, unreadable or of another model, another class count.
    """
    _check_name(model)
    options: dict[str, Any] = {"num_classes": classes} if checkpoint else {}
    options |= _input_size(model, size)
    try:
        network = timm.create_model(model, pretrained=checkpoint is None, **options)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise TeacherError(f"teacher {model}: expected weights that timm can load, found: {error}") from None
    if checkpoint:
        _load(network, _read_weights(Path(checkpoint)), checkpoint)
    found = int(network.num_classes)  # pyright: ignore[reportArgumentType]
    if found != classes:
        raise TeacherError(
            f"teacher {model}: expected {classes} classes, as the recipe says, found {found}; "
            "correct `classes`, or use a teacher trained on this class list"
        )
    settings = timm.data.resolve_model_data_config(network)
    return Teacher(model, network, size, settings["mean"], settings["std"])


def _check_name(model: str) -> None:
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise TeacherError(f"teacher {model}: expected a folder with config.json, found none; export a model there")
    elif not model.startswith("hf-hub:") and not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise TeacherError(f"teacher: expected a timm model name, found {model!r}; {hint}")


def _input_size(model: str, size: int) -> dict:
    """Transformers are built for one input size; convolutional networks do not take the argument."""
    settings = timm.get_pretrained_cfg(model, allow_unregistered=True)
    fixed = settings is not None and settings.fixed_input_size and settings.input_size[-1] != size
    return {"img_size": size} if fixed else {}


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TeacherError(f"{path}: expected teacher weights, found no file; check `checkpoint`") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TeacherError(
            f"{path}: expected tensors only (.safetensors, or .pth without pickled code), found: {reason}; "
            "save the state_dict alone"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise TeacherError(f"{path}: expected a state_dict of tensors, found {type(weights).__name__}")
    return weights


def _load(network: nn.Module, weights: Mapping[str, Tensor], checkpoint: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(f"{checkpoint}: expected the weights of this model, found others: {reason}") from None
