"""Teachers: pixels -> logits. A leaf: it imports nothing else of this project."""

from teachers.ensemble import Ensemble
from teachers.load import load_teacher
from teachers.published import PUBLISHED
from teachers.teacher import Teacher, TeacherError

__all__ = ["PUBLISHED", "Ensemble", "Teacher", "TeacherError", "load_teacher"]
