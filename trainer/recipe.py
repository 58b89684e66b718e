"""The train recipe: data, student, loss, optimizer, schedule, and what is logged."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import timm.optim
from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationInfo, field_validator, model_validator

from softshard.pipeline.recipes.recipe import Fraction, Model, Precision, ViewRecipe
from softshard.trainer.losses import TailPolicy
from softshard.trainer.students.build import Library
from softshard.trainer.students.expand import Init
from softshard.trainer.students.fused.dispatch import Implementation
from softshard.trainer.students.trace import Kind

# A smaller rate changes no float32 weight. Adaptive optimizers move a weight by about the rate, whatever its gradient.
SMALLEST_LR, LARGEST_LR, LARGEST_ADAPTIVE_LR = 1e-8, 100.0, 1.0
NOT_ADAPTIVE = ("sgd", "momentum", "nesterov", "lars", "larc")  # in the names of timm's optimizers


class LabelsRecipe(Model):
    """A store, and the weight of its labels relative to those of other stores."""

    store: str
    weight: float = Field(default=1.0, gt=0)


def _one_store(value: Any) -> Any:
    return [{"store": value}] if isinstance(value, str) else value


Stores = Annotated[
    tuple[LabelsRecipe, ...],
    Field(min_length=1),
    Strict(False),  # what comes out of _one_store is a list
    BeforeValidator(_one_store),
]


class DataRecipe(Model):
    """Images and labels, and how they are read.

    `labels` is a store, or a list of {store, weight}, one for each teacher; null trains on hard labels alone. `views`
    and `top_k` use the first views and the most probable classes of a store alone; null: all. `missing_labels: skip`
    leaves out rows that a store does not hold. `crop_pct` is timm's, for the center crop of the validation.
    """

    train: str
    validation: str
    labels: Stores | None
    views: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    size: int = Field(ge=1)
    workers: int = Field(default=8, ge=1)
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    missing_labels: Literal["error", "skip"] = "error"


class ExpandRecipe(Model):
    """The branches that convolutions have while the student trains.

    Those of `conv_types` get `branches` copies, with `scale_branch` a 1 x 1 branch, with `identity` an identity branch;
    `init` says how they start, `implementation` how they are computed.
    """

    branches: int = Field(default=3, ge=1)
    conv_types: tuple[Kind, ...] = ("depthwise", "pointwise")
    scale_branch: bool = True
    identity: bool = True
    init: Init = "zero_gamma"
    implementation: Implementation = "auto"


class StudentRecipe(Model):
    """The network that trains, and the weights that it starts from.

    `expand: null` trains the plain network. `pretrained: true` starts from the library's published weights with, for
    other classes than theirs, a fresh classifier; `checkpoint` from a local file, which must fit, or with
    `pretrained: true` holds published weights.
    """

    model: str
    library: Library = "timm"
    num_classes: int = Field(ge=2)
    pretrained: bool = False
    checkpoint: str | None = None
    expand: ExpandRecipe | None = None


class LossRecipe(Model):
    """The loss on hard and soft labels.

    `alpha` weighs soft labels against hard ones. The temperature goes from `temperature` to `final_temperature` in
    equal steps, one each update; null: it stays. `tail` says what classes without a stored probability contribute.
    """

    alpha: Fraction = 0.9
    temperature: float = Field(default=1.0, gt=0)
    final_temperature: float | None = Field(default=None, gt=0)
    tail: TailPolicy = "spread"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


def _optimizer_name(name: str) -> str:
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name in known and timm.optim.get_optimizer_info(name).second_order:
        raise ValueError(
            f"expected an optimizer that takes first derivatives alone, such as adamw or lamb (got {name!r})"
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw", "lamb", "sgd"]
        raise ValueError(f"expected an optimizer of timm.optim, near: {', '.join(near)} (got {name!r})")
    return name


class OptimizerRecipe(Model):
    """An optimizer of timm.optim.

    `options` are its own arguments, such as `betas`. Norms and biases have no weight decay. `clip_grad` bounds the
    gradient's norm, its values, or, adaptively, each filter's norm relative to that of its weights (agc, arXiv
    2102.06171); null: no bound.
    """

    name: Annotated[str, AfterValidator(_optimizer_name)] = "lamb"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    options: dict[str, bool | float | tuple[float, ...]] = Field(default_factory=dict)
    clip_grad: float | None = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    @field_validator("lr")
    @classmethod
    def _lr_can_work(cls, lr: float, info: ValidationInfo) -> float:
        name = info.data.get("name", "")  # not there when it is wrong itself
        largest = LARGEST_LR if any(part in name for part in NOT_ADAPTIVE) else LARGEST_ADAPTIVE_LR
        if name and not SMALLEST_LR <= lr <= largest:
            raise ValueError(f"expected {SMALLEST_LR:g} to {largest:g}, what {name} can work with (got {lr:g})")
        return lr


class ScheduleRecipe(Model):
    """The learning rate, changed every update.

    Linear warm-up from zero, then down to `min_lr` (cosine, linear), or by `decay_rate` every `decay_epochs` (step), or
    constant; all within `epochs`.
    """

    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    epochs: int = Field(ge=1)
    warmup_epochs: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: int | None = Field(default=None, ge=1)
    decay_rate: float | None = Field(default=None, gt=0, lt=1)

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_fits(cls, warmup: int, info: ValidationInfo) -> int:
        if warmup >= info.data.get("epochs", warmup + 1):
            raise ValueError(f"expected fewer than epochs = {info.data['epochs']} (got {warmup})")
        return warmup

    @field_validator("min_lr")
    @classmethod
    def _ends_at_min_lr(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr and info.data.get("name") in ("step", "constant"):
            raise ValueError(f"expected none for name: {info.data['name']} (got {min_lr:g}); remove it")
        return min_lr

    @model_validator(mode="after")
    def _steps_are_described(self) -> "ScheduleRecipe":
        given = self.decay_epochs is not None, self.decay_rate is not None
        if given != (self.name == "step",) * 2:
            found = f"decay_epochs: {self.decay_epochs}, decay_rate: {self.decay_rate}"
            wanted = (
                "both decay_epochs and decay_rate" if self.name == "step" else "neither decay_epochs nor decay_rate"
            )
            raise ValueError(f"expected {wanted} for name: {self.name} (got {found})")
        return self


class EmaRecipe(Model):
    """The average of the weights (timm's ModelEmaV3).

    With `warmup` the decay of update n is at most 1 - (n + 1)^(-2/3), for short runs: it is 0.99 after 1,000 updates,
    and 0.9999 after a million.
    """

    decay: float = Field(default=0.9999, gt=0, lt=1)
    warmup: bool = False


class EvaluationRecipe(Model):
    """When and on what the student is validated.

    That is after every `epochs` epochs and at the end. Its agreement with the teacher is that of their predictions on a
    view of `agreement` training images, always the same.
    """

    epochs: int = Field(default=1, ge=1)
    agreement: int = Field(default=2048, ge=0)


class LoggingRecipe(Model):
    """What is logged: `trackers` are Accelerate's (tensorboard, wandb, ...); losses are means of `updates` updates."""

    trackers: tuple[str, ...] = ("tensorboard",)
    updates: int = Field(default=50, ge=1)


class TrainRecipe(Model):
    """One complete run of training.

    `views` is the view recipe when there is no store to take it from. `batch_size` is global: over all processes and
    `accumulation` parts, which have their own batch norm statistics each. `checkpoint_minutes` pass between
    checkpoints within an epoch; there is one after each validation as well.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "watch": "logging",
        "student.expand.kinds": "conv_types",
        "student.expand.scale": "scale_branch",
        "student.expand.branches_as": "implementation",
    }

    data: DataRecipe
    views: ViewRecipe | None = None
    student: StudentRecipe
    loss: LossRecipe = LossRecipe()
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe
    ema: EmaRecipe | None = EmaRecipe()
    batch_size: int = Field(ge=1)
    accumulation: int = Field(default=1, ge=1)
    precision: Precision = "float32"
    sync_batch_norm: bool = False
    compile: bool = False
    evaluation: EvaluationRecipe = EvaluationRecipe()
    logging: LoggingRecipe = LoggingRecipe()
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    output: str
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_view_recipe(self) -> "TrainRecipe":
        if self.data.labels is None and self.views is None:
            raise ValueError("views: expected a section, since data.labels is null (got none); add it, or name a store")
        if self.data.labels is not None and self.views is not None:
            raise ValueError(
                "views: expected none, since a store has the views it was made with (got some); remove them"
            )
        return self

    @model_validator(mode="after")
    def _min_lr_is_smaller(self) -> "TrainRecipe":
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr: expected at most optimizer.lr = {self.optimizer.lr:g} (got {self.schedule.min_lr:g})"
            )
        return self
