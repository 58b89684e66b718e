"""Weights from local files, of teachers and of students: read without running code, loaded whole or not at all.

timm could load a file by itself (`pretrained_cfg_overlay={"file": ...}`), but passes over missing tensors of a few
models, and of all models where the number of classes is another.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import timm.models
from torch import Tensor, nn


class WeightsError(Exception):
    """There is no such file, or its weights are those of another network."""


class BrokenWeightsError(WeightsError):
    """A file does not hold a state dict of tensors, or it is damaged."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors or .pth file.

    Of a .pth file it is the EMA, `state_dict` or `model` entry, if there is one, as timm reads it.

    Raises:
        WeightsError: no such file.
        BrokenWeightsError: pickled code, a broken file, something other than tensors.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{path}: expected a file of weights, found none; correct the path")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        others = {type(value).__name__ for value in weights.values() if not isinstance(value, Tensor)}
    except Exception as error:  # a broken pickle fails in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BrokenWeightsError(
            f"{path}: expected a .safetensors file, or a .pth file of tensors only, found: {reason}; pickled code is "
            "not read: save the state_dict alone"
        ) from None
    if others or not weights:
        found = ", ".join(sorted(others)) or "an empty one"
        raise BrokenWeightsError(f"{path}: expected a state_dict of tensors, found {found}; save the state_dict alone")
    return cast(dict[str, Tensor], weights)


def in_layout_of(network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass weights in their authors' layout through timm's filter for the architecture.

    It renames, and it resamples position embeddings to the network's input size. timm itself applies it to published
    weights alone, so it is looked up by its name. Weights that break it come back as they were: load_weights says what
    is different in them.
    """
    convert = cast(
        Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None,
        getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None),
    )
    if convert is None or _shapes(weights) == _shapes(network.state_dict()):
        return weights
    try:
        return convert(dict(weights), network)
    except Exception:  # weights of another model break a filter in any way
        return weights


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    what: str = "this model",
    remedy: str = "correct `model`, `classes` or the file",
) -> None:
    """Load all of `weights` into all of `network`.

    Counters of batches may be missing: batch norms had none before torch 0.4.1.

    Args:
        network: what the weights belong to.
        weights: under the network's own names, or under older ones that its modules know.
        where: the source of the weights, for the error.
        what: the network, for the error: "expected the weights of ...".
        remedy: what to do, for the error.

    Raises:
        WeightsError: tensors are missing, unknown or of another shape; the first of them are named.
    """
    state = network.state_dict()
    differences = differences_from(state, weights)
    try:
        if differences:  # unless the network's modules know these names from older versions of themselves
            network.load_state_dict(weights)
        else:  # with the network's versions of its modules, which files do not keep
            state.update(weights)
            network.load_state_dict(state)
    except Exception as error:  # a module may raise anything for a state of another
        found = differences or " ".join(str(error).split())[:300]
        raise WeightsError(f"{where}: expected the weights of {what}, found others: {found}; {remedy}") from None


def differences_from(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Say 'missing a, b and 2 more; unknown c; d [10, 4] instead of [7, 4]', or nothing."""
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in expected]
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    kinds = {"missing ": missing, "unknown ": unknown, "": shapes}
    return "; ".join(f"{kind}{_first(keys)}" for kind, keys in kinds.items() if keys)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
