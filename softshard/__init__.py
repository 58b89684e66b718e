"""softshard: precompute a teacher's soft labels once, train compact re-parameterized students from them.

The names below are what a user needs from Python. Each is imported when it is first used, so that `import softshard`
takes no time and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softshard.pipeline.images.beton import Beton as Beton
    from softshard.pipeline.images.beton import open_beton as open_beton
    from softshard.pipeline.recipes.recipe import LabelRecipe as LabelRecipe
    from softshard.pipeline.recipes.recipe import PackRecipe as PackRecipe
    from softshard.pipeline.recipes.recipe import ViewRecipe as ViewRecipe
    from softshard.pipeline.recipes.yaml_file import load_recipe as load_recipe
    from softshard.pipeline.runtime.errors import SoftshardError as SoftshardError
    from softshard.pipeline.store.store import Store as Store
    from softshard.pipeline.store.store import open_store as open_store
    from softshard.pipeline.store.topk import Codes as Codes
    from softshard.pipeline.store.topk import SoftLabels as SoftLabels
    from softshard.pipeline.store.topk import decode as decode
    from softshard.pipeline.store.topk import encode as encode
    from softshard.pipeline.views.loader import ViewLoader as ViewLoader
    from softshard.teachers import Teacher as Teacher
    from softshard.teachers import load_teacher as load_teacher
    from softshard.trainer.losses import distillation_loss as distillation_loss
    from softshard.trainer.losses import topk_kl as topk_kl
    from softshard.trainer.recipe import TrainRecipe as TrainRecipe
    from softshard.trainer.students import build_student as build_student
    from softshard.trainer.students import expand as expand
    from softshard.trainer.students import fold as fold
    from softshard.verbs import evaluate as evaluate
    from softshard.verbs import export as export
    from softshard.verbs import label as label
    from softshard.verbs import pack as pack
    from softshard.verbs import render as render
    from softshard.verbs import train as train

_HOMES = {
    "pipeline.images.beton": ("Beton", "open_beton"),
    "pipeline.recipes.recipe": ("LabelRecipe", "PackRecipe", "ViewRecipe"),
    "pipeline.recipes.yaml_file": ("load_recipe",),
    "pipeline.runtime.errors": ("SoftshardError",),
    "pipeline.store.store": ("Store", "open_store"),
    "pipeline.store.topk": ("Codes", "SoftLabels", "decode", "encode"),
    "pipeline.views.loader": ("ViewLoader",),
    "teachers": ("Teacher", "load_teacher"),
    "trainer.losses": ("distillation_loss", "topk_kl"),
    "trainer.recipe": ("TrainRecipe",),
    "trainer.students": ("build_student", "expand", "fold"),
    "verbs": ("evaluate", "export", "label", "pack", "render", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
