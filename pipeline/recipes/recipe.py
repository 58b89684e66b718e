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
    ratio: Annotated[tuple[Aspect, Aspect], AfterValidator(_ordered)] = (0.75, 1.3333)


class RandAugmentRecipe(Model):
    """timm's `rand-mM-nN-pP-mstdS-incI`: `operations` of its 15, each applied with `probability`."""

    magnitude: float = Field(default=9.0, ge=0, le=10)
    std: float = Field(default=0.5, ge=0, le=10)
    increasing: bool = True
    operations: int = Field(default=2, ge=1, le=8)
    probability: Fraction = 0.5


class AutoAugmentRecipe(Model):
    policy: Literal["original"] = "original"


class TrivialAugmentRecipe(Model):
    """torchvision's TrivialAugmentWide with `bins` magnitudes; translations are not rounded to pixels."""

    bins: int = Field(default=31, ge=2, le=1024)


class ThreeAugmentRecipe(Model):
    """DeiT III: gray, solarise or blur, then color jitter of strength `jitter`."""

    jitter: Fraction = 0.3


class ColorJitterRecipe(Model):
    """torchvision's ColorJitter; with timm's default strengths."""

    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: float = Field(default=0.0, ge=0, le=0.5)


class RandomErasingRecipe(Model):
    """timm's RandomErasing. `area` is a fraction of the view, shared by `count` boxes (always as many, where timm's
    --recount draws from 1 up). `const` fills with the mean color, `pixel` with noise around it."""

    probability: Fraction = 0.25
    area: Annotated[tuple[Area, Area], AfterValidator(_ordered)] = (0.02, 0.3333)
    aspect: Annotated[tuple[Aspect, Aspect], AfterValidator(_ordered)] = (0.3, 3.3333)
    count: int = Field(default=1, ge=1, le=16)
    mode: Literal["const", "pixel"] = "pixel"


class MixRecipe(Model):
    """Mixup or CutMix with another image of the packed set; its share is drawn from Beta(alpha, alpha)."""

    alpha: float = Field(default=1.0, ge=0.01, le=10)
    probability: Fraction = 1.0


class ViewRecipe(Model):
    """What a view is, apart from the key and the view number. `count` is V, the number of views of each image.

    In the order of their work: crop, flip, one of the four policies, color jitter, erasing, mixing. With
    `dct_scaling`, crops of at least twice the output size are decoded at 1/2, 1/4 or 1/8: faster, other pixels.
    """

    seed: int = Field(ge=0, lt=2**64)
    count: int = Field(ge=1)
    crop: CropRecipe | None = CropRecipe()
    hflip: Fraction = 0.5
    rand_augment: RandAugmentRecipe | None = None
    auto_augment: AutoAugmentRecipe | None = None
    trivial_augment: TrivialAugmentRecipe | None = None
    three_augment: ThreeAugmentRecipe | None = None
    color_jitter: ColorJitterRecipe | None = None
    random_erasing: RandomErasingRecipe | None = None
    mixup: MixRecipe | None = None
    cutmix: MixRecipe | None = None
    dct_scaling: bool = False

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
    label: str = "label"


class SourceRecipe(Model):
    """Where images come from. For tars and parquet, `path` is a file, a folder or a pattern: `{0000..1023}`, `*`."""

    kind: Literal["imagefolder", "webdataset", "parquet"]
    path: str
    columns: ColumnsRecipe | None = None

    @model_validator(mode="after")
    def _columns_of_parquet(self) -> "SourceRecipe":
        if self.columns is not None and self.kind != "parquet":
            raise ValueError(f"columns belongs to kind: parquet (got kind: {self.kind})")
        return self


class PackRecipe(Model):
    source: SourceRecipe
    classes: str | None = None
    output: str
    max_side: int | None = Field(default=None, ge=1, le=65535)
    on_bad_image: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _beton_suffix(self) -> "PackRecipe":
        if not self.output.endswith(".beton"):
            raise ValueError(f"output must end in .beton (got {self.output!r})")
        return self


class TeacherRecipe(Model):
    """A timm or torchvision classifier. `checkpoint` is a local .safetensors or .pth file; null takes the library's
    published weights. `size` is that of its views, in pixels; null takes the one it was trained for. `weight` is its
    share in an ensemble, relative to the others'."""

    model: str
    library: Literal["timm", "torchvision"] = "timm"
    checkpoint: str | None = None
    size: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0)


class TemplateRecipe(Model):
    """The tail template of each image is the mean over its first `views` views."""

    views: int = Field(default=16, ge=1)


class LabelRecipe(Model):
    """`ensemble` is what is averaged over several teachers, and over a view and its mirror image with `flip_average`.
    `min_top1`, in percent, is what the teachers must reach on the hard labels of a few views before they may label.
    `os_cache: false` reads whole pages ahead, for a .beton larger than memory or on a slow disk."""

    beton: str
    store: str
    classes: int = Field(ge=2)
    views: ViewRecipe
    teachers: tuple[TeacherRecipe, ...] = Field(min_length=1)
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    flip_average: bool = False
    min_top1: float | None = Field(default=None, ge=0, le=100)
    top_k: int = Field(ge=1, le=255)
    template: TemplateRecipe | None = None
    block_rows: int = Field(default=32768, ge=1)
    batch_size: int = Field(default=256, ge=1)
    precision: Precision = "float32"
    channels_last: bool = True
    compile: bool = False
    workers: int = Field(default=8, ge=1)
    os_cache: bool = True

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
