"""Teachers from torchvision's classification models."""
# pyright: reportMissingTypeStubs=false

import pickle
import re
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from softshard.teachers.teacher import Preprocessing, Teacher, TeacherError, unknown_name
from softshard.teachers.weights import load_weights, read_weights

# No auxiliary heads, which eval mode does not use. The published weights, and what is tuned from them, were ported from
# TensorFlow and expect its scaling of the pixels, which transform_input applies; a state dict does not say it.
_INCEPTION = {"aux_logits": False, "init_weights": False, "transform_input": True}
_POSITIONS = "encoder.pos_embedding"
_OLD_DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def load_torchvision(model: str, checkpoint: str | None, size: int | None, classes: int) -> Teacher:
    """Load a teacher as load_teacher does; mean, std and interpolation are those of the model's default weights."""
    names = models.list_models(module=models)  # detection, segmentation and video live in submodules
    if model not in names:
        listing = "torchvision.models.list_models(module=torchvision.models)"
        raise unknown_name(model, "a torchvision classification model", names, listing)
    enumeration: Any = models.get_model_weights(model)  # pyright: ignore[reportUnknownMemberType]
    published = enumeration.DEFAULT
    transforms = published.transforms()
    size = size or int(transforms.crop_size[0])
    classes = classes if checkpoint else len(published.meta["categories"])
    try:
        network = models.get_model(model, weights=None, num_classes=classes, **_options(model, size))
        weights = read_weights(checkpoint) if checkpoint else _download(published)
    except (OSError, RuntimeError, ValueError, AssertionError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"teacher {model}: expected a model and weights that torchvision can load, found: {reason}; "
            f"correct `size`, or fetch {published.url} elsewhere and give the file as `checkpoint`"
        ) from None
    load_weights(network, _fit(network, weights, size), checkpoint or str(published))
    wanted = Preprocessing(size, tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value)
    return Teacher(model, "torchvision", network, classes, wanted)


def _download(published: models.WeightsEnum) -> dict[str, Tensor]:
    """From torch's hub cache, if they are there. Without weights_only torch would unpickle whatever the file holds."""
    return published.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)


def _options(model: str, size: int) -> dict[str, Any]:
    """Transformers are built for one input size."""
    if model.startswith("vit_"):
        return {"image_size": size}
    if model.startswith("maxvit_"):
        return {"input_size": (size, size)}
    return _INCEPTION if model in ("googlenet", "inception_v3") else {}


def _fit(network: nn.Module, weights: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """What torchvision's builders do to weights, and position embeddings resampled to the input size."""
    if isinstance(network, models.GoogLeNet | models.Inception3):
        return {name: tensor for name, tensor in weights.items() if not name.lower().startswith("aux")}
    if isinstance(network, models.DenseNet):  # the published names are from before modules' names lost their dots
        return {_OLD_DENSE.sub(r"\1\2", name): tensor for name, tensor in weights.items()}
    if isinstance(network, models.VisionTransformer) and _POSITIONS in weights:
        try:
            return interpolate_embeddings(size, network.patch_size, OrderedDict(weights))
        except (ValueError, RuntimeError):  # of another model: load_weights says what is different
            return weights
    return weights
