"""The train recipe: data, student, loss, optimiser, schedule. pipeline/recipe_file.py reads it."""

import difflib
from typing import Annotated, Literal

import timm.optim
from pydantic import AfterValidator, Field, model_validator

from pipeline.recipe import Fraction, Model, ViewRecipe
from trainer.losses import TailPolicy
from trainer.students.build import Library
from trainer.students.expand import Init
from trainer.students.one_convolution import BranchesAs
from trainer.students.trace import Kind


class DataRecipe(Model):
    """`labels: null` trains on hard labels alone. `views` and `top_k` use the first views and the most probable classes
    of a store alone; null: all. `missing_labels: skip` leaves out rows that the store does not hold. `crop_pct` is
    timm's, for the centre crop of the validation."""

    train: str
    validation: str
    labels: str | None
    views: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    size: int = Field(ge=1)
    workers: int = Field(default=8, ge=1)
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    missing_labels: Literal["error", "skip"] = "error"


class ExpandRecipe(Model):
    branches: int = Field(default=3, ge=1)
    kinds: tuple[Kind, ...] = ("depthwise", "pointwise")
    scale: bool = True
    identity: bool = True
    init: Init = "zero_gamma"
    branches_as: BranchesAs = "auto"


class StudentRecipe(Model):
    """`expand: null` trains the plain network. `pretrained: true` starts from the library's published weights with, for
    other classes than theirs, a fresh classifier; `checkpoint` from a local file, which must fit, or with
    `pretrained: true` holds published weights."""

    model: str
    library: Library = "timm"
    num_classes: int = Field(ge=2)
    pretrained: bool = False
    checkpoint: str | None = None
    expand: ExpandRecipe | None = None


class LossRecipe(Model):
    alpha: Fraction = 0.9
    temperature: float = Field(default=1.0, gt=0)
    tail: TailPolicy = "spread"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


def _optimizer_name(name: str) -> str:
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw", "lamb", "sgd"]
        raise ValueError(f"expected an optimiser of timm.optim, near: {', '.join(near)} (got {name!r})")
    return name


class OptimizerRecipe(Model):
    name: Annotated[str, AfterValidator(_optimizer_name)] = "lamb"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.05, ge=0)


class ScheduleRecipe(Model):
    """Linear warm-up, then cosine down to min_lr; both within `epochs`."""

    name: Literal["cosine"] = "cosine"
    epochs: int = Field(ge=1)
    warmup_epochs: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class EmaRecipe(Model):
    decay: float = Field(default=0.9999, gt=0, lt=1)


class TrainRecipe(Model):
    """`views` is the view recipe when there is no store to take it from. `batch_size` is global: over all processes."""

    data: DataRecipe
    views: ViewRecipe | None = None
    student: StudentRecipe
    loss: LossRecipe = LossRecipe()
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe
    ema: EmaRecipe | None = EmaRecipe()
    batch_size: int = Field(ge=1)
    output: str
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_view_recipe(self) -> "TrainRecipe":
        if self.data.labels is None and self.views is None:
            raise ValueError("views: expected a section, since data.labels is null (got none)")
        if self.data.labels is not None and self.views is not None:
            raise ValueError("views: expected none, since the store of data.labels has the views it was made with")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainRecipe":
        if self.schedule.warmup_epochs >= self.schedule.epochs:
            raise ValueError(f"schedule.warmup_epochs: expected fewer than epochs (got {self.schedule.warmup_epochs})")
        return self
