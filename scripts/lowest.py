"""Pins of the lowest versions that pyproject.toml declares, as a constraints file: `make test-python LOWEST=1`."""

import re
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FLOOR = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(;.*)?")


def lowest_pins(project: dict[str, Any]) -> list[str]:
    """The `project` table of a pyproject.toml -> one line `name==version` for each requirement.

    torch and torchvision are a matching pair when their floors are, which the set-up tries out.
    """
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for lines in extras for line in lines)]
    return sorted({_pin(requirement) for requirement in requirements})


def _pin(requirement: str) -> str:
    floor = FLOOR.fullmatch(requirement.replace(" ", ""))
    if floor is None:
        raise SystemExit(f"{PROJECT}: expected NAME>=VERSION, found {requirement!r}; declare its lowest version")
    return f"{floor[1]}=={floor[2]}{floor[3] or ''}"


if __name__ == "__main__":
    print("\n".join(lowest_pins(tomllib.loads(PROJECT.read_text())["project"])))
