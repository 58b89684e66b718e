"""Recipes: one YAML file describes one complete run.

Frozen pydantic models that refuse unknown and wrongly typed keys; pipeline/recipes/yaml_file.py reads and writes them.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Aspect = Annotated[float, Field(ge=0.01, le=100)]
Precision = Literal["float32", "bf16", "fp16"]  # of the teachers, under autocast
POLICIES = ("rand_augment", "auto_augment", "trivial_augment", "three_augment")


class Model(BaseModel):
    """Base of every recipe and manifest: frozen, strictly typed, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    renamed: ClassVar[Mapping[str, str]] = {}  # former `section.key` of a recipe file: what the key is called now


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the lower bound comes first (got {list(bounds)})")
    return bounds


class CropRecipe(Model):
    """Random resized crop (torchvision's RandomResizedCrop): area as a fraction of the image, then aspect ratio."""

    scale: Annotated[tuple[Area, Area], AfterValidator(_ordered)] = (0.08, 1.0)
    """Smallest and largest area of the crop, as fractions of the image."""
    ratio: Annotated[tuple[Aspect, Aspect], AfterValidator(_ordered)] = (0.75, 1.3333)
    """Smallest and largest width / height of the crop."""


class RandAugmentRecipe(Model):
    """timm's `rand-mM-nN-pP-mstdS-incI`: `operations` of its 15, each applied with `probability`."""

    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Strength M of the operations."""
    std: float = Field(default=0.5, ge=0, le=10)
    """Standard deviation of the strength."""
    increasing: bool = True
    """Larger strengths change more (timm's `inc1`)."""
    operations: int = Field(default=2, ge=1, le=8)
    """How many operations, N."""
    probability: Fraction = 0.5
    """Of each operation."""


class AutoAugmentRecipe(Model):
    """timm's AutoAugment."""

    policy: Literal["original"] = "original"
    """The policy of the paper for ImageNet."""


class TrivialAugmentRecipe(Model):
    """torchvision's TrivialAugmentWide with `bins` magnitudes; translations are not rounded to pixels."""

    bins: int = Field(default=31, ge=2, le=1024)
    """How many strengths there are."""


class ThreeAugmentRecipe(Model):
    """DeiT III: gray, solarize or blur, then color jitter of strength `jitter`."""

    jitter: Fraction = 0.3
    """Strength of the color jitter."""


class ColorJitterRecipe(Model):
    """torchvision's ColorJitter; with timm's default strengths."""

    brightness: Fraction = 0.4
    """Largest change of brightness."""
    contrast: Fraction = 0.4
    """Largest change of contrast."""
    saturation: Fraction = 0.4
    """Largest change of saturation."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Largest change of hue, as a fraction of its circle."""


class RandomErasingRecipe(Model):
    """timm's RandomErasing; always `count` boxes, where timm's --recount draws from 1 up."""

    probability: Fraction = 0.25
    """Of erasing in a view."""
    area: Annotated[tuple[Area, Area], AfterValidator(_ordered)] = (0.02, 0.3333)
    """Smallest and largest erased area, as fractions of the view, shared by the boxes."""
    aspect: Annotated[tuple[Aspect, Aspect], AfterValidator(_ordered)] = (0.3, 3.3333)
    """Smallest and largest height / width of a box."""
    count: int = Field(default=1, ge=1, le=16)
    """How many boxes."""
    mode: Literal["const", "pixel"] = "pixel"
    """`const` fills boxes with the mean color, `pixel` with noise around it."""


class MixRecipe(Model):
    """Mixup or CutMix with another image of the packed set."""

    alpha: float = Field(default=1.0, ge=0.01, le=10)
    """What is left of the image itself, lambda, is drawn from Beta(alpha, alpha)."""
    probability: Fraction = 1.0
    """Of mixing a view."""


class ViewRecipe(Model):
    """What a view is, apart from the key and the view number.

    In the order of their work: crop, flip, one of the four policies, color jitter, erasing, mixing.
    """

    seed: int = Field(ge=0, lt=2**64)
    """Seed of all draws; another seed gives other views."""
    count: int = Field(ge=1)
    """V, the number of views of each image."""
    crop: CropRecipe | None = CropRecipe()
    """Random resized crop; null: the largest centered square."""
    hflip: Fraction = 0.5
    """Probability of a mirrored view; 0 where a mirrored image is of another class."""
    rand_augment: RandAugmentRecipe | None = None
    """RandAugment; at most one of the four policies."""
    auto_augment: AutoAugmentRecipe | None = None
    """AutoAugment."""
    trivial_augment: TrivialAugmentRecipe | None = None
    """TrivialAugment."""
    three_augment: ThreeAugmentRecipe | None = None
    """ThreeAugment, which has a color jitter of its own."""
    color_jitter: ColorJitterRecipe | None = None
    """Color jitter, after the policy."""
    random_erasing: RandomErasingRecipe | None = None
    """Random erasing."""
    mixup: MixRecipe | None = None
    """Mixup."""
    cutmix: MixRecipe | None = None
    """CutMix; with both, each view has one of them by equal chance."""
    dct_scaling: bool = False
    """Decode crops of at least twice the output size at 1/2, 1/4 or 1/8: faster, different pixels."""

    @model_validator(mode="after")
    def _one_policy(self) -> "ViewRecipe":
        given = [name for name in POLICIES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of {', '.join(POLICIES)} (got {', '.join(given)})")
        if self.three_augment and self.color_jitter:
            raise ValueError("three_augment has its own jitter: leave out color_jitter (got both)")
        return self

    @property
    def mixes(self) -> bool:
        """Whether a view also depends on the other images of the packed set."""
        return self.mixup is not None or self.cutmix is not None


class ColumnsRecipe(Model):
    """Names of the columns of parquet files."""

    image: str = "image"
    """Column with the image: bytes, or a struct with `bytes` and `path`."""
    label: str = "label"
    """Column with the class number."""


class SourceRecipe(Model):
    """Where images come from."""

    kind: Literal["imagefolder", "webdataset", "parquet"]
    """Layout of the data set."""
    path: str
    """Folder of class folders; for tars and parquet a file, a folder or a pattern (`{0000..1023}`, `*`)."""
    columns: ColumnsRecipe | None = None
    """Names of the columns, for parquet alone; null: `image` and `label`."""

    @model_validator(mode="after")
    def _columns_of_parquet(self) -> "SourceRecipe":
        if self.columns is not None and self.kind != "parquet":
            raise ValueError(f"columns belongs to kind: parquet (got kind: {self.kind})")
        return self


class PackRecipe(Model):
    """A data set, and the .beton that it becomes."""

    source: SourceRecipe
    """Where the images come from."""
    classes: str | None = None
    """File with one class name a line, in index order; null: the sorted folders, or the source's numbers."""
    output: str
    """The file to write; ends in .beton."""
    max_side: int | None = Field(default=None, ge=1, le=65535)
    """Larger images are scaled down to this many pixels; null: no limit."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded; `skip` counts it."""

    @model_validator(mode="after")
    def _beton_suffix(self) -> "PackRecipe":
        if not self.output.endswith(".beton"):
            raise ValueError(f"output must end in .beton (got {self.output!r})")
        return self


class TeacherRecipe(Model):
    """A timm or torchvision classifier."""

    model: str
    """A name of the library, or `local-dir:PATH` for an exported folder."""
    library: Literal["timm", "torchvision"] = "timm"
    """Where the name is looked up."""
    checkpoint: str | None = None
    """Local .safetensors or .pth file; null: the library's published weights."""
    size: int | None = Field(default=None, ge=1)
    """Pixels of a side of its views; null: the size it was trained for."""
    weight: float = Field(default=1.0, gt=0)
    """Weight in an ensemble, relative to the others'."""


class TemplateRecipe(Model):
    """The tail template of each image: how its tail lies on the classes."""

    views: int = Field(default=16, ge=1)
    """The template is the mean log-probability over this many first views."""


class LabelRecipe(Model):
    """A packed data set, its views, the teachers that label them, and what is kept."""

    beton: str
    """The packed images."""
    store: str
    """Folder or bucket (s3://, gs://) of the labels."""
    classes: int = Field(ge=2)
    """Number of classes, C."""
    views: ViewRecipe
    """The views that the teachers see."""
    teachers: tuple[TeacherRecipe, ...] = Field(min_length=1)
    """One teacher, or several as an ensemble."""
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over teachers, and over mirror images."""
    flip_average: bool = False
    """Average each view with its mirror image."""
    min_top1: float | None = Field(default=None, ge=0, le=100)
    """Percent of a few hundred views that the teachers must get right before they label; null: any."""
    top_k: int = Field(ge=1, le=255)
    """Classes kept of each view, K."""
    template: TemplateRecipe | None = None
    """Tail template; null: the tail is spread evenly."""
    block_rows: int = Field(default=32768, ge=1)
    """Images of a block, the unit of work and of resuming."""
    batch_size: int = Field(default=256, ge=1)
    """Images that a teacher sees at once."""
    precision: Precision = "float32"
    """Arithmetic of the teachers, under autocast."""
    channels_last: bool = True
    """Memory layout of the teachers."""
    compile: bool = False
    """Compile the teachers with torch.compile."""
    workers: int = Field(default=8, ge=1)
    """Threads that decode and augment, for each process."""
    os_cache: bool = True
    """false reads pages ahead itself: for a .beton larger than memory or on a slow disk."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> "LabelRecipe":
        if self.top_k > self.classes:
            raise ValueError(f"top_k: expected at most classes = {self.classes} (got {self.top_k})")
        return self

    @model_validator(mode="after")
    def _template_fits(self) -> "LabelRecipe":
        if self.template and self.template.views > self.views.count:
            raise ValueError(
                f"template.views must be at most views.count = {self.views.count} (got {self.template.views})"
            )
        if self.template and self.top_k == self.classes:
            raise ValueError(f"template: expected null, since top_k = classes = {self.classes} leaves no tail")
        return self
