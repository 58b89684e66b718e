"""A teacher by its library and name."""

from typing import Literal

from softshard.teachers.from_timm import load_timm
from softshard.teachers.from_torchvision import load_torchvision
from softshard.teachers.teacher import Teacher, TeacherError

LOADERS = {"timm": load_timm, "torchvision": load_torchvision}


def load_teacher(
    model: str, library: Literal["timm", "torchvision"], checkpoint: str | None, size: int | None, classes: int
) -> Teacher:
    """A classifier by its name in `library` (`local-dir:PATH` for a folder that timm exported), with the published
    weights, or with those of a local .safetensors or .pth file (read without unpickling code).

    `size` is that of the input in pixels; None takes the one that the published weights were trained for. Position
    embeddings of another size are resampled as the library does it. Mean, standard deviation and interpolation are
    those of the published weights.

    Raises TeacherError: unknown name, weights that are missing, unreadable, out of reach or of another model, another
    class count, an input size that the model cannot have.
    """
    teacher = LOADERS[library](model, checkpoint, size, classes)
    if teacher.classes != classes:
        raise TeacherError(
            f"teacher {model}: expected {classes} classes, as the recipe says, found {teacher.classes}; "
            "correct `classes`, or use a teacher trained on this class list"
        )
    return teacher
