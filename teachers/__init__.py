"""Teachers: pixels -> logits. A leaf: it imports nothing else of this project.

Names are imported when they are used, so that a student reads its weights (weights.py) without the teachers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softshard.teachers.ensemble import Ensemble
    from softshard.teachers.load import load_teacher
    from softshard.teachers.published import PUBLISHED
    from softshard.teachers.teacher import Teacher, TeacherError

__all__ = ["PUBLISHED", "Ensemble", "Teacher", "TeacherError", "load_teacher"]

_MODULES = {
    "PUBLISHED": "published",
    "Ensemble": "ensemble",
    "Teacher": "teacher",
    "TeacherError": "teacher",
    "load_teacher": "load",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
