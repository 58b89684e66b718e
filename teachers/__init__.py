"""Teachers: pixels -> logits. A leaf: it imports nothing else of this project."""

from teachers.teacher import Teacher, TeacherError, load_teacher

__all__ = ["Teacher", "TeacherError", "load_teacher"]
