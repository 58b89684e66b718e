"""Recipe files: YAML in, a validated model out, and back.

Every problem is reported at once as `file: section.key: what is wrong (got X)`. YAML 1.2 is read (`1e-3` is a number,
`no` is not a boolean); there are no includes and no environment variables.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from softshard.pipeline.recipes.recipe import Model
from softshard.pipeline.runtime.errors import RecipeError, near
from softshard.pipeline.runtime.files import write_atomically

Override = tuple[str, str]  # ("section.key", YAML text of the value)
M = TypeVar("M", bound=Model)


def load_recipe(model: type[M], path: str | Path, overrides: Sequence[Override] = ()) -> M:
    """Read a recipe file, apply `--section.key VALUE` overrides, validate.

    Raises:
        RecipeError: one line for each problem: unreadable file, YAML syntax, duplicate, unknown, missing or wrongly
            typed keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected a readable YAML recipe, found: {error}; check --config") from None
    data, duplicates = _parse(text, str(path))
    if not _is_mapping(data):
        raise RecipeError(
            f"{path}: expected a mapping of sections, found {type(data).__name__}; see configs/ for examples"
        )
    for dotted, value in overrides:
        _override(data, dotted, value)
    return _validated(model, data, str(path), duplicates, {dotted for dotted, _ in overrides})


def as_recipe(model: type[M], recipe: M | Mapping[str, Any] | str | PathLike[str]) -> M:
    """Take a recipe as it is, as plain data, or from a YAML file.

    Raises:
        RecipeError: as `load_recipe` does.
    """
    if isinstance(recipe, model):
        return recipe
    if isinstance(recipe, Mapping):
        return _validated(model, recipe, model.__name__, [], set())
    return load_recipe(model, str(recipe))


def dump_recipe(recipe: Model) -> str:
    """Write the resolved recipe as YAML; loading it again gives an equal recipe."""
    stream = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # keep the order of the model, which is the order of the work
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def save_recipe(recipe: Model, path: Path) -> None:
    """Write the resolved recipe to a file, whole or not at all."""
    write_atomically(path, dump_recipe(recipe).encode())


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield the leaves in which two recipes or manifests (plain data) differ: `views.seed: expected 0, found 1`."""
    if _is_mapping(expected) and _is_mapping(found):
        for key in list(expected) + [key for key in found if key not in expected]:
            yield from differences(expected.get(key), found.get(key), f"{where}.{key}" if where else str(key))
    elif expected != found:
        yield f"{where}: expected {expected!r}, found {found!r}"


def _parse(text: str, name: str) -> tuple[Any, list[str]]:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # reported by _duplicates, all at once, with their lines
    try:
        tree = yaml.compose(text)
        return yaml.load(text), [] if tree is None else list(_duplicates(tree, name, ""))
    except YAMLError as error:
        raise RecipeError(f"{name}: expected YAML, found: {' '.join(str(error).split())}") from None


def _is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _duplicates(node: Any, name: str, where: str) -> Iterator[str]:
    if node.id == "sequence":
        for position, item in enumerate(node.value):
            yield from _duplicates(item, name, f"{where}.{position}")
    elif node.id == "mapping":
        seen: set[str] = set()
        for key, value in node.value:
            dotted = f"{where}.{key.value}".lstrip(".")
            if key.value in seen:
                yield f"{name}: {dotted}: duplicate key (got it again in line {key.start_mark.line + 1})"
            seen.add(key.value)
            yield from _duplicates(value, name, dotted)


def _override(data: dict[str, Any], dotted: str, text: str) -> None:
    *sections, last = dotted.split(".")
    target: Any = data
    for section in sections:
        if _is_list(target) and section.isdecimal() and int(section) < len(target):
            target = target[int(section)]
        elif _is_mapping(target):
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
        else:
            raise RecipeError(f"--{dotted}: expected a section named {section!r}, found {type(target).__name__}")
    value, _ = _parse(text, f"--{dotted}")
    if _is_list(target) and last.isdecimal() and int(last) < len(target):
        target[int(last)] = value
    elif _is_mapping(target):
        target[last] = value
    else:
        raise RecipeError(f"--{dotted}: expected a key, found {type(target).__name__} above it")


def _validated(
    model: type[M], data: Mapping[str, Any], name: str, duplicates: Sequence[str], overridden: set[str]
) -> M:
    problems = list(duplicates)
    try:
        # through JSON, where a list is a legal tuple and types stay strict
        recipe = model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise RecipeError("\n".join(problems + _problems(error, model, name, overridden))) from None
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _problems(error: ValidationError, model: type[Model], name: str, overridden: set[str]) -> list[str]:
    lines: list[str] = []
    problems = error.errors(include_url=False)
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
            what = problem["msg"]
            if problem["type"] == "extra_forbidden":
                rest = by_option[0][len(dotted) :] if by_option else ""
                new = model.renamed.get(dotted)
                what = f"renamed; write {new}{rest}" if new else _unknown(model, problem["loc"])
            lines.append(f"{where}: {what[0].lower()}{what[1:]} (got {json.dumps(problem['input'], default=str)})")
    return lines


def _unknown(model: type[Model], location: tuple[int | str, ...]) -> str:
    """Say what a key that there is none of may have meant."""
    *sections, key = location
    section: type[Model] | None = model
    for part in sections:
        if section and part in section.model_fields:
            section = _model_of(section.model_fields[str(part)].annotation)
    hint = near(str(key), section.model_fields) if section else ""
    return f"unknown key; {hint}" if hint else "unknown key"


def _model_of(annotation: object) -> type[Model] | None:
    """The model of a section whose type is it, may be null, or is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_of(part))), None)
