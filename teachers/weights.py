"""Weights from local files, read without running code and loaded whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import timm.models
from torch import Tensor, nn

from softshard.teachers.teacher import TeacherError


def read_weights(checkpoint: str) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors or .pth file.

    Of a .pth file it is the EMA, `state_dict` or `model` entry, if there is one, as timm reads it.

    Raises:
        TeacherError: no such file, pickled code, a broken file, something other than tensors.
    """
    if not Path(checkpoint).is_file():
        raise TeacherError(f"{checkpoint}: expected teacher weights, found no file; check `checkpoint`")
    try:
        weights = timm.models.load_state_dict(checkpoint, weights_only=True)
    except Exception as error:  # a broken pickle fails in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TeacherError(
            f"{checkpoint}: expected tensors only (.safetensors, or .pth without pickled code), found: {reason}; "
            "save the state_dict alone"
        ) from None
    other = {type(value).__name__ for value in weights.values() if not isinstance(value, Tensor)}
    if other or not weights:
        raise TeacherError(
            f"{checkpoint}: expected a state_dict of tensors, found {', '.join(sorted(other)) or 'an empty one'}; "
            "save the state_dict alone"
        )
    return weights


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Put all of `weights` into the network; `where` names their source in errors.

    Raises:
        TeacherError: a tensor is missing, left over or of another shape.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise wrong_weights(where, error) from None


def wrong_weights(where: str, error: Exception) -> TeacherError:
    """Make the error for weights that do not fit their network."""
    reason = " ".join(str(error).split())[:300]
    return TeacherError(
        f"{where}: expected the weights of this model, found others: {reason}; correct `model`, `classes` or the file"
    )
