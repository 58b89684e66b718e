"""Weights from local files: read without running code, loaded whole or not at all."""

import sys
from collections.abc import Mapping
from pathlib import Path

import timm.models
from torch import Tensor, nn

from softshard.pipeline.runtime.errors import DataError, FormatError, few


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a .pth file: there of its EMA, `state_dict` or `model` entry, if it
    has one, as timm reads it.

    Raises DataError when there is no such file, FormatError for a broken file, pickled code, or something other than
    tensors.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: expected a file of student weights, found none; correct the path")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        others = {type(value).__name__ for value in weights.values() if not isinstance(value, Tensor)}
    except Exception as error:  # a broken pickle fails in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{path}: expected a .safetensors file, or a .pth file of tensors only, found: {reason}; pickled code is "
            "not read: save the state_dict alone"
        ) from None
    if others or not weights:
        found = ", ".join(sorted(others)) or "an empty one"
        raise FormatError(f"{path}: expected a state_dict of tensors, found {found}; save the state_dict alone")
    return weights


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: str, what: str) -> None:
    """Load all of `weights` into all of `network`; `where` and `what` (expected the weights of ...) are for the error.

    Raises DataError, with the network unchanged, that names the first tensors that are missing, unknown or of another
    shape. Counters of batches may be missing: batch norms had none before torch 0.4.1.
    """
    state = network.state_dict()
    differences = _differences(state, weights)
    if differences:
        raise DataError(
            f"{where}: expected the weights of {what}, found others: {differences}; take the recipe that they were "
            "trained with"
        )
    state.update(weights)
    network.load_state_dict(state)


def load_plain_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    model: str,
    num_classes: int,
    fresh_classifier: bool,
) -> None:
    """Load weights, in the library's layout or in one that timm converts, into the plain `model` of `num_classes`.

    With `fresh_classifier` a classifier of other classes keeps its initial weights. Raises DataError otherwise and
    when the weights are of another architecture.
    """
    weights = _in_the_layout_of(network, weights)
    state = network.state_dict()
    # In the same architecture nothing but the classifier has another number of outputs.
    other_classes = {
        key: state[key]
        for key, value in weights.items()
        if key in state and value.shape != state[key].shape and _without_outputs(value) == _without_outputs(state[key])
        if len(state[key]) == num_classes
    }
    if other_classes and not fresh_classifier and not _differences(state, {**weights, **other_classes}):
        key = next(iter(other_classes))
        raise DataError(
            f"{where}: expected weights of {num_classes} classes, found {len(weights[key])} in {key}; correct "
            "student.num_classes, or set student.pretrained to true to start with a fresh classifier"
        )
    fitting = {**weights, **other_classes} if fresh_classifier else weights
    load_weights(network, fitting, where, f"a plain {model}")


def _without_outputs(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.ndim, tuple(tensor.shape[1:])


def _in_the_layout_of(network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Published weights in their authors' layout pass through timm's filter for the architecture. timm itself applies
    it only to what it downloads, so it is looked up by its name."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or weights.keys() == network.state_dict().keys():
        return weights
    try:
        return convert(dict(weights), network)
    except Exception:  # weights of another model break a filter in any way; load_weights says what differs
        return weights


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """'missing a, b and 2 more; unknown c; d [10, 4] instead of [7, 4]', or nothing."""
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in expected]
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    kinds = {"missing ": missing, "unknown ": unknown, "": shapes}
    return "; ".join(f"{kind}{few(keys)}" for kind, keys in kinds.items() if keys)
