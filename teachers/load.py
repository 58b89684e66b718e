"""A teacher by its library and name."""

from typing import Literal

from softshard.teachers.from_timm import load_timm
from softshard.teachers.from_torchvision import load_torchvision
from softshard.teachers.teacher import Teacher, TeacherError
from softshard.teachers.weights import WeightsError

LOADERS = {"timm": load_timm, "torchvision": load_torchvision}


def load_teacher(
    model: str, library: Literal["timm", "torchvision"], checkpoint: str | None, size: int | None, classes: int
) -> Teacher:
    """Load a frozen classifier by its name.

    Mean, standard deviation and interpolation are those of the published weights.

    Args:
        model: its name in `library`, or `local-dir:PATH` for a folder that timm exported.
        library: whose registry the name belongs to.
        checkpoint: a local .safetensors or .pth file, read without unpickling code; None takes the published weights.
        size: of the input, in pixels; None takes the one that the published weights were trained for. Position
            embeddings of another size are resampled as the library does it.
        classes: how many logits the teacher must give.

    Raises:
        TeacherError: unknown name; weights that are missing, unreadable, out of reach or of another model; another
            class count; an input size that the model cannot have.
    """
    try:
        teacher = LOADERS[library](model, checkpoint, size, classes)
    except WeightsError as error:
        raise TeacherError(str(error)) from None
    if teacher.classes != classes:
        raise TeacherError(
            f"teacher {model}: expected {classes} classes, as the recipe says, found {teacher.classes}; "
            "correct `classes`, or use a teacher trained on this class list"
        )
    return teacher
