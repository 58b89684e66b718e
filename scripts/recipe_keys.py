"""The tables of docs/recipes.md: every recipe key with its type, default and meaning, read from the models.

    python scripts/recipe_keys.py build/recipe-keys

A key's meaning is the docstring below it in its model; a key without one is an error.
"""

import ast
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import softshard.pipeline.recipes.recipe
import softshard.trainer.recipe
from softshard.pipeline.recipes.recipe import LabelRecipe, Model, PackRecipe, ViewRecipe
from softshard.trainer.recipe import TrainRecipe

RECIPES: dict[str, type[Model]] = {"pack": PackRecipe, "views": ViewRecipe, "label": LabelRecipe, "train": TrainRecipe}
MODELS = {
    name: model
    for module in (softshard.pipeline.recipes.recipe, softshard.trainer.recipe)
    for name, model in inspect.getmembers(module, inspect.isclass)
    if issubclass(model, Model)
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
Schema = dict[str, Any]


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in RECIPES.items():
        (folder / f"{name}.md").write_text(table(model))
    return 0


def table(model: type[Model]) -> str:
    """The keys of a recipe as a table in Markdown, those of its sections below them."""
    schema = model.model_json_schema()
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    prefix = "views." if model is ViewRecipe else ""
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(schema, schema.get("$defs", {}), prefix)]
    return "\n".join(lines) + "\n"


def rows(schema: Schema, models: dict[str, Schema], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    meanings = docstrings(MODELS[schema["title"]])
    for key, entry in schema["properties"].items():
        default = f"`{as_yaml(entry['default'])}`" if "default" in entry else "required"
        if key in schema.get("required", ()):
            default = "required"
        elif "default" not in entry:
            default = "`{}`"  # made by a factory: an empty mapping
        yield f"`{prefix}{key}`", type_of(entry), default, meanings[key]
        section = section_of(entry)
        if section and section != ViewRecipe.__name__:
            dots = ".N." if "array" in json.dumps(entry) else "."
            yield from rows(models[section], models, f"{prefix}{key}{dots}")


def docstrings(model: type[Model]) -> dict[str, str]:
    """The docstring below each key of a model. Raises SystemExit for a key without one."""
    [body] = [
        node.body
        for node in ast.parse(textwrap.dedent(inspect.getsource(model))).body
        if isinstance(node, ast.ClassDef)
    ]
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    missing = [key for key in model.model_fields if key not in found]
    if missing:
        raise SystemExit(
            f"{model.__name__}: expected a docstring below {', '.join(missing)}, found none; say what it means"
        )
    return found


def section_of(entry: Schema) -> str | None:
    """The model of a key that is a section, or a list of sections."""
    found = re.search(r"#/\$defs/(\w+)", json.dumps(entry))
    return found[1] if found else None


def type_of(entry: Schema) -> str:
    if "anyOf" in entry:
        return " or ".join(type_of(part) for part in entry["anyOf"])
    if "$ref" in entry:
        return "section"
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry["type"] == "array":
        parts = entry.get("prefixItems")
        return (
            f"two of {type_of(parts[0])}"
            if parts
            else f"list of {type_of(entry['items'])}".replace("section", "sections")
        )
    name = {"integer": "int", "number": "float", "boolean": "bool", "object": "mapping"}.get(
        entry["type"], entry["type"]
    )
    limits = [f"{sign} {entry[limit]:g}" for limit, sign in LIMITS.items() if entry.get(limit, 2**32) < 2**32]
    return f"{name} {', '.join(limits)}".strip()


def as_yaml(value: Any) -> str:
    """A default as one writes it in a recipe: sections that are made of defaults alone are empty mappings."""
    return "{}" if isinstance(value, dict) else json.dumps(value).replace('"', "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
