"""Teachers from timm's registry, its hub, or a folder that timm exported."""
# timm has no annotations.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from pathlib import Path
from typing import Any

import timm
import timm.data

from softshard.teachers.teacher import Preprocessing, Teacher, TeacherError, unknown_name
from softshard.teachers.weights import in_layout_of, load_weights, read_weights


def load_timm(model: str, checkpoint: str | None, size: int | None, classes: int) -> Teacher:
    """Load a teacher as load_teacher does; everything but `size` is as the model's pretrained_cfg says."""
    _check_name(model)
    options: dict[str, Any] = {"num_classes": classes} if checkpoint else {}
    options |= _input_size(model, size)
    try:
        network = timm.create_model(model, pretrained=checkpoint is None, **options)
    except Exception as error:  # hubs, caches and model constructors fail in any way
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"teacher {model}: expected a model and weights that timm can load, found: {reason}; "
            "correct `size`, or give a local file as `checkpoint` where the hub cannot be reached"
        ) from None
    if checkpoint:
        load_weights(network, in_layout_of(network, read_weights(checkpoint)), checkpoint)
    settings = timm.data.resolve_model_data_config(network)
    found = int(network.num_classes)  # pyright: ignore[reportArgumentType]
    wanted = Preprocessing(
        size or settings["input_size"][-1], settings["mean"], settings["std"], settings["interpolation"]
    )
    return Teacher(model, "timm", network, found, wanted)


def _check_name(model: str) -> None:
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise TeacherError(f"teacher {model}: expected a folder with config.json, found none; export a model there")
    elif not (model.startswith("hf-hub:") or _is_known(model)):
        names = timm.list_models() + timm.list_pretrained()
        raise unknown_name(model, "a timm model name", names, "timm.list_models()")


def _is_known(model: str) -> bool:
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError:  # the architecture exists, the tag does not
        return False
    return timm.is_model(model)


def _input_size(model: str, size: int | None) -> dict[str, Any]:
    """Transformers are built for one input size; convolutional networks do not take the argument."""
    settings = timm.get_pretrained_cfg(model, allow_unregistered=True)
    fixed = settings is not None and settings.fixed_input_size and settings.input_size[-1] != size
    return {"img_size": size} if size and fixed else {}
