"""The weights that a plain student starts from, and what is wrong with files of weights in the errors of a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.teachers.weights import (
    BrokenWeightsError,
    WeightsError,
    differences_from,
    in_layout_of,
    load_weights,
)

REMEDY = "take the recipe that they were trained with"


@contextmanager
def errors_of_weights() -> Iterator[None]:
    """Raise FormatError for a broken file of weights; DataError where there is none, or where weights do not fit."""
    try:
        yield
    except BrokenWeightsError as error:
        raise FormatError(str(error)) from None
    except WeightsError as error:
        raise DataError(str(error)) from None


def load_plain_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    model: str,
    num_classes: int,
    fresh_classifier: bool,
) -> None:
    """Load weights, in the library's layout or in one that timm converts, into a plain student.

    Args:
        network: the student.
        weights: what it shall start from.
        where: their source, for errors.
        model: the student's name, for errors.
        num_classes: the outputs of its classifier.
        fresh_classifier: whether a classifier of other classes keeps its initial weights.

    Raises:
        DataError: the weights are of other classes and the classifier is not to start afresh.
        WeightsError: they are of another architecture.
    """
    weights = in_layout_of(network, weights)
    state = network.state_dict()
    # In the same architecture nothing but the classifier has another number of outputs.
    other_classes = {
        key: state[key]
        for key, value in weights.items()
        if key in state and value.shape != state[key].shape and _without_outputs(value) == _without_outputs(state[key])
        if len(state[key]) == num_classes
    }
    if other_classes and not fresh_classifier and not differences_from(state, {**weights, **other_classes}):
        key = next(iter(other_classes))
        raise DataError(
            f"{where}: expected weights of {num_classes} classes, found {len(weights[key])} in {key}; correct "
            "student.num_classes, or set student.pretrained to true to start with a fresh classifier"
        )
    fitting = {**weights, **other_classes} if fresh_classifier else weights
    load_weights(network, fitting, where, f"a plain {model}", REMEDY)


def _without_outputs(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.ndim, tuple(tensor.shape[1:])
