"""Students: stock models, made multi-branch for training (expand) and plain again for use (fold)."""

from softshard.trainer.students.build import build_student
from softshard.trainer.students.expand import expand
from softshard.trainer.students.fold import fold

__all__ = ["build_student", "expand", "fold"]
