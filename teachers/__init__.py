"""Teachers: pixels -> logits. A leaf: it imports nothing else of this project."""

from softshard.teachers.ensemble import Ensemble
from softshard.teachers.load import load_teacher
from softshard.teachers.published import PUBLISHED
from softshard.teachers.teacher import Teacher, TeacherError

__all__ = ["PUBLISHED", "Ensemble", "Teacher", "TeacherError", "load_teacher"]
