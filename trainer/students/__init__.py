"""Students: stock models, made multi-branch for training (expand) and plain again for use (fold)."""

from trainer.students.build import build_student
from trainer.students.expand import expand
from trainer.students.fold import fold

__all__ = ["build_student", "expand", "fold"]
