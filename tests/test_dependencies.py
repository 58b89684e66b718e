"""Every package that is imported is declared, with a lowest version that `make test-python LOWEST=1` can pin."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers.paths import ROOT
from lowest import lowest_pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
LIBRARY = ("softshard", "pipeline", "teachers", "trainer")
TOOLS = ("tests", "benchmarks", "scripts")
DISTRIBUTIONS = packages_distributions()
PLACES = [ROOT, *(path.parent for folder in TOOLS for path in (ROOT / folder).rglob("*.py"))]


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: str) -> dict[str, Path]:
    """The names at the top of what a folder's files import, and a file for each."""
    found: dict[str, Path] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {name.split(".")[0]: path for name in names}
    return found


def is_ours(name: str) -> bool:
    """Whether a name is a file or folder of this repository: tests and benchmarks import their neighbors."""
    return any((place / f"{name}.py").exists() or (place / name).is_dir() for place in PLACES)


@pytest.mark.parametrize("folder", [*LIBRARY, *TOOLS])
def test_what_is_imported_is_declared(folder: str) -> None:
    unknown = []
    for name, path in imported(folder).items():
        if name in sys.stdlib_module_names or is_ours(name):
            continue
        distributions = DISTRIBUTIONS.get(name, [name])  # what is not installed is called as its module
        if not declared(REQUIREMENTS) & {normal(distribution) for distribution in distributions}:
            unknown.append(f"{path.relative_to(ROOT)} imports {name}, of {distributions}")
    assert not unknown


def test_every_requirement_has_a_lowest_version() -> None:
    pins = lowest_pins(PROJECT)
    assert {"torch==2.9", "torchvision==0.24"} <= set(pins)
    assert declared(pins) == declared(REQUIREMENTS)
