"""Recipes: one YAML file describes one complete run.

A recipe is read into frozen pydantic models that refuse unknown, duplicate and wrongly typed keys, and every problem
is reported at once as `file: section.key: what is wrong (got X)`. YAML 1.2 is read (`1e-3` is a number, `no` is not
a boolean); there are no includes and no environment variables.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from pipeline.errors import RecipeError
from pipeline.files import write_atomically

Override = tuple[str, str]  # ("section.key", YAML text of the value)
Fraction = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Aspect = Annotated[float, Field(ge=0.01, le=100)]
POLICIES = ("rand_augment", "auto_augment", "trivial_augment", "three_augment")


class Model(BaseModel):
    """Base of every recipe and manifest: frozen, strictly typed, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


M = TypeVar("M", bound=Model)


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
    """torchvision's TrivialAugmentWide with `bins` magnitudes."""

    bins: int = Field(default=31, ge=2, le=1024)


class ThreeAugmentRecipe(Model):
    """DeiT III: grey, solarise or blur, then colour jitter of strength `jitter`."""

    jitter: Fraction = 0.3


class ColorJitterRecipe(Model):
    """torchvision's ColorJitter; with timm's default strengths."""

    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: float = Field(default=0.0, ge=0, le=0.5)


class RandomErasingRecipe(Model):
    """timm's RandomErasing. `area` is a fraction of the view, shared by `count` boxes; `const` fills with the mean
    colour, `pixel` with noise around it."""

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

    In the order of their work: crop, flip, one of the four policies, colour jitter, erasing, mixing. With
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
    """A timm model. `checkpoint` is a local .safetensors or .pth file; null takes timm's published weights."""

    model: str
    checkpoint: str | None = None
    size: int = Field(ge=1)
    weight: float = Field(default=1.0, gt=0)


class LabelRecipe(Model):
    beton: str
    store: str
    classes: int = Field(ge=2)
    views: ViewRecipe
    teachers: tuple[TeacherRecipe, ...] = Field(min_length=1, max_length=1)
    top_k: int = Field(ge=1, le=255)
    block_rows: int = Field(default=32768, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _top_k_fits(self) -> "LabelRecipe":
        if self.top_k > self.classes:
            raise ValueError(f"top_k must be at most classes = {self.classes} (got {self.top_k})")
        return self


def load_recipe(model: type[M], path: str | Path, overrides: Sequence[Override] = ()) -> M:
    """Read a recipe file, apply `--section.key VALUE` overrides, validate.

    Raises RecipeError with one line for each problem: unreadable file, YAML syntax, duplicate, unknown, missing or
    wrongly typed keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected a readable YAML recipe, found: {error}; check --config") from None
    data, duplicates = _parse(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}: expected a mapping of sections, found {type(data).__name__}; see configs/ for examples"
        )
    for dotted, value in overrides:
        _override(data, dotted, value)
    try:
        # through JSON, where a list is a legal tuple and types stay strict
        recipe = model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        overridden = {dotted for dotted, _ in overrides}
        raise RecipeError("\n".join(duplicates + _problems(error, str(path), overridden))) from None
    if duplicates:
        raise RecipeError("\n".join(duplicates))
    return recipe


def dump_recipe(recipe: Model) -> str:
    """The resolved recipe as YAML; loading it again gives an equal recipe."""
    stream = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # keep the order of the model, which is the order of the work
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def save_recipe(recipe: Model, path: Path) -> None:
    write_atomically(path, dump_recipe(recipe).encode())


def first_difference(expected: Any, found: Any, where: str = "") -> str | None:
    """The first leaf in which two recipes or manifests (as plain data) differ: `views.seed: 0 here, 1 there`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in list(expected) + [key for key in found if key not in expected]:
            inner = first_difference(expected.get(key), found.get(key), f"{where}.{key}" if where else str(key))
            if inner:
                return inner
        return None
    return None if expected == found else f"{where}: expected {expected!r}, found {found!r}"


def _parse(text: str, name: str) -> tuple[Any, list[str]]:
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # reported by _duplicates, all at once, with their lines
    try:
        tree = yaml.compose(text)
        return yaml.load(text), [] if tree is None else list(_duplicates(tree, name, ""))
    except YAMLError as error:
        raise RecipeError(f"{name}: expected YAML, found: {' '.join(str(error).split())}") from None


def _duplicates(node: Node, name: str, where: str):
    if isinstance(node, SequenceNode):
        for position, item in enumerate(node.value):
            yield from _duplicates(item, name, f"{where}.{position}")
    elif isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            dotted = f"{where}.{key.value}".lstrip(".")
            if key.value in seen:
                yield f"{name}: {dotted}: duplicate key (got it again in line {key.start_mark.line + 1})"
            seen.add(key.value)
            yield from _duplicates(value, name, dotted)


def _override(data: dict, dotted: str, text: str) -> None:
    *sections, last = dotted.split(".")
    target: Any = data
    for section in sections:
        if isinstance(target, list) and section.isdecimal() and int(section) < len(target):
            target = target[int(section)]
        elif isinstance(target, dict):
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
        else:
            raise RecipeError(f"--{dotted}: expected a section named {section!r}, found {type(target).__name__}")
    value, _ = _parse(text, f"--{dotted}")
    if isinstance(target, list) and last.isdecimal() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(f"--{dotted}: expected a key, found {type(target).__name__} above it")


def _problems(error: ValidationError, name: str, overridden: set[str]) -> list[str]:
    lines, problems = [], error.errors(include_url=False)
    for problem in problems:
        depth = len(problem["loc"])
        if problem["type"] == "too_short" and any(p["loc"][:depth] == problem["loc"] != p["loc"] for p in problems):
            continue  # pydantic counts a list's valid items only; the invalid ones have lines of their own
        dotted = ".".join(str(part) for part in problem["loc"])
        by_option = [option for option in overridden if f"{option}.".startswith(f"{dotted}.") and dotted]
        where = f"--{by_option[0]}" if by_option else f"{name}: {dotted}".removesuffix(": ")
        if problem["type"] == "missing":
            lines.append(f"{where}: missing key")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {problem.get('ctx', {}).get('error')}")
        else:
            what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
            lines.append(f"{where}: {what[0].lower()}{what[1:]} (got {json.dumps(problem['input'], default=str)})")
    return lines
