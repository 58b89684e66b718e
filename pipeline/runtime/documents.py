"""Recipes and manifests as plain data, nested as they are written."""

from typing import Any


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested sections as `section.key`, so that they can be given to a recipe as they stand.

    Returns:
        {"name.section.key": value}; {name: value} for a value that is no section.
    """
    if not isinstance(value, dict):
        return {name: value}
    prefix = f"{name}." if name else ""
    return {leaf: found for key, inner in value.items() for leaf, found in flatten(inner, f"{prefix}{key}").items()}
