"""Build the plain student: a stock timm or torchvision classifier."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torchvision.models
from torch import nn

from softshard.pipeline.runtime.errors import RecipeError, near
from softshard.teachers.weights import read_weights
from softshard.trainer.students.weights import errors_of_weights, load_plain_weights

Library = Literal["timm", "torchvision"]

# GhostNetV3 (arXiv 2404.11202) is the body of GhostNetV2 trained with branches. timm's models called ghostnetv3_* have
# branches of their own, which leave out one that the authors have and fold into a model of no stock name.
_GHOSTNETV3: dict[str, tuple[str, dict[str, Any]]] = {
    "ghostnetv3_050": ("ghostnet_050", {"version": "v2"}),  # timm has a name for every width but this one
    "ghostnetv3_100": ("ghostnetv2_100", {}),
    "ghostnetv3_130": ("ghostnetv2_130", {}),
    "ghostnetv3_160": ("ghostnetv2_160", {}),
}

# Auxiliary heads would make the output in training another one than logits.
_NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}
_TORCHVISION_OPTIONS = {"googlenet": _NO_AUXILIARY_HEADS, "inception_v3": _NO_AUXILIARY_HEADS}


def build_student(
    model: str,
    num_classes: int,
    *,
    library: Library = "timm",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Build a stock classifier.

    Args:
        model: its name in the library. ghostnetv3_050, _100, _130 and _160 are the bodies of GhostNetV2, which expand
            makes GhostNetV3; with a tag (ghostnetv3_100.in1k) a name means timm's own model, which expand leaves alone.
        num_classes: how many outputs it has.
        library: whose model it is.
        pretrained: load the library's published weights, which are downloaded where they are not cached. A classifier
            of another size than `num_classes` starts afresh. Without, nothing is downloaded.
        checkpoint: a local .safetensors file, or a .pth file of tensors alone. With `pretrained` it stands for the
            published weights; without, its classifier must fit, too.

    Returns:
        The model, float32, on the CPU, in training mode: images float32 [N, 3, H, W] -> logits float32
        [N, num_classes].

    Raises:
        RecipeError: the library or the model is unknown (near matches are named), num_classes is below 1, or weights
            are asked for that do not exist or cannot be downloaded.
        DataError: `checkpoint` is missing, or holds the weights of another model or of other classes.
        FormatError: `checkpoint` is broken.
    """
    if library not in _BUILDERS:
        raise RecipeError(f"student.library: expected one of {', '.join(_BUILDERS)}, found {library!r}")
    if num_classes < 1:
        raise RecipeError(f"student.num_classes: expected at least 1 class, found {num_classes}")
    plain = _BUILDERS[library](model, num_classes, pretrained and checkpoint is None)
    if checkpoint is not None:
        start = {"model": model, "num_classes": num_classes, "fresh_classifier": pretrained}
        with errors_of_weights():
            load_plain_weights(plain, read_weights(checkpoint), str(checkpoint), **start)
    return plain


def _build_timm(model: str, num_classes: int, pretrained: bool) -> nn.Module:
    # A name may carry a tag (resnet18.a1_in1k), but no source: timm would look hf-hub:... up on the network.
    names = timm.list_models(include_tags="." in model)
    if model not in names:
        raise _unknown("timm", model, names)
    name, options = _GHOSTNETV3.get(model, (model, {}))
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes, **options)
    if not timm.is_model_pretrained(name):
        raise RecipeError(
            f"student.pretrained: timm has no weights for {model!r}; set it to false, "
            "or choose one of timm.list_models(pretrained=True)"
        )
    return _with_weights(model, lambda: timm.create_model(name, num_classes=num_classes, pretrained=True, **options))


def _build_torchvision(model: str, num_classes: int, pretrained: bool) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if model not in names:
        raise _unknown("torchvision", model, names)
    options = _TORCHVISION_OPTIONS.get(model, {})
    plain = torchvision.models.get_model(model, weights=None, num_classes=num_classes, **options)
    if pretrained:
        stock = _with_weights(model, lambda: torchvision.models.get_model(model, weights="DEFAULT"))
        weights = {key: value for key, value in stock.state_dict().items() if not options or "aux" not in key.lower()}
        load_plain_weights(plain, weights, model, model=model, num_classes=num_classes, fresh_classifier=True)
    return plain


def _with_weights(model: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except OSError as error:  # what urllib and huggingface_hub raise for the network and for the disk
        raise RecipeError(
            f"student.pretrained: the weights of {model!r} are not in the cache and could not be downloaded "
            f"({error}); connect once, give a file as student.checkpoint, or set it to false"
        ) from error


def _unknown(library: str, model: str, names: Sequence[str]) -> RecipeError:
    hint = near(model, names)
    listing = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}[library]
    return RecipeError(
        f"student.model: no {library} model is called {model!r}{f' ({hint})' if hint else ''}; {listing} lists them"
    )


_BUILDERS: dict[str, Callable[[str, int, bool], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
