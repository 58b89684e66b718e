"""Build the plain student: a stock timm or torchvision classifier."""

import difflib
from collections.abc import Callable, Sequence
from typing import Literal

import timm
import torchvision.models
from torch import nn

from pipeline.errors import RecipeError


def build_student(
    model: str,
    num_classes: int,
    *,
    library: Literal["timm", "torchvision"] = "timm",
    pretrained: bool = False,
) -> nn.Module:
    """The stock model `model` of `library` with `num_classes` outputs: float32, on the CPU, in training mode.

    Input and output are the library's: images float32 [N, 3, H, W] -> logits float32 [N, num_classes].
    With `pretrained` the library's published weights are loaded (and downloaded where they are not
    cached); a classifier of another size than `num_classes` starts afresh. Without, nothing is downloaded.

    Raises RecipeError when the library or the model is unknown (naming near matches), when num_classes
    is below 1, and when weights are asked for that do not exist or cannot be read.
    """
    if library not in _BUILDERS:
        raise RecipeError(f"student.library: expected one of {', '.join(_BUILDERS)}, found {library!r}")
    if num_classes < 1:
        raise RecipeError(f"student.num_classes: expected at least 1 class, found {num_classes}")
    return _BUILDERS[library](model, num_classes, pretrained)


def _build_timm(model: str, num_classes: int, pretrained: bool) -> nn.Module:
    # A name may carry a tag (resnet18.a1_in1k), but no source: timm would look hf-hub:... up on the network.
    names = timm.list_models(include_tags="." in model)
    if model not in names:
        raise _unknown("timm", model, names)
    if not pretrained:
        return timm.create_model(model, num_classes=num_classes)
    if not timm.is_model_pretrained(model):
        raise RecipeError(
            f"student.pretrained: timm has no weights for {model!r}; set it to false, "
            "or choose one of timm.list_models(pretrained=True)"
        )
    return _with_weights(model, lambda: timm.create_model(model, num_classes=num_classes, pretrained=True))


def _build_torchvision(model: str, num_classes: int, pretrained: bool) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if model not in names:
        raise _unknown("torchvision", model, names)
    plain = torchvision.models.get_model(model, weights=None, num_classes=num_classes)
    if pretrained:
        stock = _with_weights(model, lambda: torchvision.models.get_model(model, weights="DEFAULT"))
        _load_all_but_the_classifier(plain, stock)
    return plain


def _load_all_but_the_classifier(model: nn.Module, stock: nn.Module) -> None:
    """Copy the weights of `stock`, of the same architecture; only a classifier's shape depends on the classes."""
    state = model.state_dict()
    state.update({key: value for key, value in stock.state_dict().items() if value.shape == state[key].shape})
    model.load_state_dict(state)


def _with_weights(model: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except OSError as error:  # what urllib and huggingface_hub raise for the network and for the disk
        raise RecipeError(
            f"student.pretrained: the weights of {model!r} are not in the cache and could not be downloaded "
            f"({error}); connect once, or set it to false"
        ) from error


def _unknown(library: str, model: str, names: Sequence[str]) -> RecipeError:
    matches = difflib.get_close_matches(model, names)
    near = f" (near: {', '.join(matches)})" if matches else ""
    listing = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}[library]
    return RecipeError(f"student.model: no {library} model is called {model!r}{near}; {listing} lists them")


_BUILDERS: dict[str, Callable[[str, int, bool], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
