"""The train recipe: data, student, loss, optimizer, schedule, and what is logged."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import timm.optim
from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationInfo, field_validator, model_validator

from softshard.pipeline.recipes.recipe import Fraction, Model, Precision, ViewRecipe
from softshard.pipeline.runtime.errors import near
from softshard.trainer.losses import TailPolicy
from softshard.trainer.students.build import Library
from softshard.trainer.students.expand import Init
from softshard.trainer.students.fused.dispatch import Implementation
from softshard.trainer.students.trace import ConvType

# A smaller rate changes no float32 weight. Adaptive optimizers move a weight by about the rate, whatever its gradient.
SMALLEST_LR, LARGEST_LR, LARGEST_ADAPTIVE_LR = 1e-8, 100.0, 1.0
NOT_ADAPTIVE = ("sgd", "momentum", "nesterov", "lars", "larc")  # in the names of timm's optimizers


class LabelsRecipe(Model):
    """A store, and the weight of its labels relative to those of other stores."""

    store: str
    """Folder or bucket of the labels."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of its divergence, relative to the other stores'."""


def _one_store(value: Any) -> Any:
    return [{"store": value}] if isinstance(value, str) else value


Stores = Annotated[
    tuple[LabelsRecipe, ...],
    Field(min_length=1),
    Strict(False),  # what comes out of _one_store is a list
    BeforeValidator(_one_store),
]


class DataRecipe(Model):
    """Packed images to train on and to validate with, and the labels."""

    train: str
    """The .beton to train on."""
    validation: str
    """The .beton to validate with."""
    labels: Stores | None
    """A store, or a list of stores with weights, one for each teacher; null: hard labels alone."""
    views: int | None = Field(default=None, ge=1)
    """Use only the first views of the store, this many; null: all."""
    top_k: int | None = Field(default=None, ge=1)
    """Use only the most probable classes of the store, this many; null: all."""
    size: int = Field(ge=1)
    """Pixels of a view's side."""
    workers: int = Field(default=8, ge=1)
    """Threads that decode and augment, for each process."""
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    """timm's crop_pct, for the center crop of the validation."""
    missing_labels: Literal["error", "skip"] = "error"
    """What to do with images that a store does not hold."""


class ExpandRecipe(Model):
    """The branches that convolutions have while the student trains."""

    branches: int = Field(default=3, ge=1)
    """Copies of each convolution, each with its own batch norm."""
    conv_types: tuple[ConvType, ...] = ("depthwise", "pointwise")
    """Which convolutions get branches; also `dense` and `grouped`."""
    scale_branch: bool = True
    """A 1 x 1 branch beside larger kernels."""
    identity: bool = True
    """The input itself as a branch, where it has the output's shape."""
    init: Init = "zero_gamma"
    """`zero_gamma` starts as the plain network bit for bit; `split_gamma` with the weights spread over the branches."""
    implementation: Implementation = "auto"
    """How the branches of a layer are computed."""


class StudentRecipe(Model):
    """The network that is trained."""

    model: str
    """A timm or torchvision classifier, or ghostnetv3_050, _100, _130 or _160."""
    library: Library = "timm"
    """Where the name is looked up."""
    num_classes: int = Field(ge=2)
    """Number of classes."""
    pretrained: bool = False
    """Start from published weights; for other classes with a fresh classifier."""
    checkpoint: str | None = None
    """Start from a local file, which must fit; with `pretrained` it holds the published weights."""
    expand: ExpandRecipe | None = None
    """Branches while it trains; null: the plain network."""


class LossRecipe(Model):
    """(1 - alpha) cross-entropy on hard labels + alpha T^2 KL(teacher || student) at temperature T."""

    alpha: Fraction = 0.9
    """Weight of the soft labels; 1 - alpha is that of the hard ones."""
    temperature: float = Field(default=1.0, gt=0)
    """T, at the first update."""
    final_temperature: float | None = Field(default=None, gt=0)
    """T at the last update, reached in equal steps; null: it stays."""
    tail: TailPolicy = "spread"
    """What classes outside the top k contribute."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Smoothing of the hard labels."""


def _optimizer_name(name: str) -> str:
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name in known and timm.optim.get_optimizer_info(name).second_order:
        raise ValueError(
            f"expected an optimizer that takes first derivatives alone, such as adamw or lamb (got {name!r})"
        )
    if name not in known:
        hint = near(name, known) or "near: adamw, lamb, sgd"
        raise ValueError(f"expected an optimizer of timm.optim, {hint} (got {name!r})")
    return name


class OptimizerRecipe(Model):
    """An optimizer of timm.optim. Norms and biases have no weight decay."""

    name: Annotated[str, AfterValidator(_optimizer_name)] = "lamb"
    """A name of timm.optim."""
    lr: float = Field(gt=0)
    """Learning rate after the warm-up, for the global batch."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay."""
    options: dict[str, bool | float | tuple[float, ...]] = Field(default_factory=dict)
    """Arguments of the optimizer itself, such as `betas` or `eps`."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Bound of the gradient; null: none."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What is bounded: the norm, each value, or each filter's norm relative to its weights' (arXiv 2102.06171)."""

    @field_validator("lr")
    @classmethod
    def _lr_can_work(cls, lr: float, info: ValidationInfo) -> float:
        name = info.data.get("name", "")  # not there when it is wrong itself
        largest = LARGEST_LR if any(part in name for part in NOT_ADAPTIVE) else LARGEST_ADAPTIVE_LR
        if name and not SMALLEST_LR <= lr <= largest:
            raise ValueError(f"expected {SMALLEST_LR:g} to {largest:g}, what {name} can work with (got {lr:g})")
        return lr


class ScheduleRecipe(Model):
    """The learning rate, which changes every update: linear warm-up from zero, then the named curve."""

    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    """Down to min_lr (cosine, linear), by decay_rate every decay_epochs (step), or constant."""
    epochs: int = Field(ge=1)
    """Epochs in all; epoch e sees view e mod V."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs of warm-up, part of `epochs`."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end, of cosine and linear."""
    decay_epochs: int | None = Field(default=None, ge=1)
    """Epochs between two steps, of step alone."""
    decay_rate: float | None = Field(default=None, gt=0, lt=1)
    """Factor of each step, of step alone."""

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
    """Decay of the average."""
    warmup: bool = False
    """Smaller decays at first, for short runs."""


class EvaluationRecipe(Model):
    """How often the student is validated, which it is at the end in any case."""

    epochs: int = Field(default=1, ge=1)
    """Epochs between two validations."""
    agreement: int = Field(default=2048, ge=0)
    """Number of training images on which the student's predictions are compared with the teacher's, in one view."""


class LoggingRecipe(Model):
    """What is logged, and where."""

    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate's trackers: tensorboard, wandb, mlflow, ..."""
    updates: int = Field(default=50, ge=1)
    """Number of updates whose mean losses are logged."""


class TrainRecipe(Model):
    """One training run of a student, or of a teacher for one's own classes."""

    renamed: ClassVar[Mapping[str, str]] = {
        "watch": "logging",
        "student.expand.kinds": "student.expand.conv_types",
        "student.expand.scale": "student.expand.scale_branch",
        "student.expand.branches_as": "student.expand.implementation",
    }

    data: DataRecipe
    """Images and labels."""
    views: ViewRecipe | None = None
    """The view recipe, where there is no store to take it from."""
    student: StudentRecipe
    """The network."""
    loss: LossRecipe = LossRecipe()
    """The loss."""
    optimizer: OptimizerRecipe
    """The optimizer."""
    schedule: ScheduleRecipe
    """The learning rate."""
    ema: EmaRecipe | None = EmaRecipe()
    """Average of the weights; null: none."""
    batch_size: int = Field(ge=1)
    """Images of an update, over all processes and parts."""
    accumulation: int = Field(default=1, ge=1)
    """Parts of a batch, one after the other, each with its own batch norm statistics."""
    precision: Precision = "float32"
    """Arithmetic of the student, under autocast."""
    sync_batch_norm: bool = False
    """Batch norm statistics over all processes."""
    compile: bool = False
    """Compile the student with torch.compile."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """Validation."""
    logging: LoggingRecipe = LoggingRecipe()
    """Where losses and scores are logged."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """Minutes between checkpoints within an epoch; there is one after each validation, too."""
    output: str
    """The run folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of weights, dropout and the order of images."""

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
