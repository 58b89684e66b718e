"""What an installation must bring beside the code."""

import tomllib
from pathlib import Path

from helpers.paths import ROOT

ROOMS = ("pipeline", "teachers", "trainer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed_and_typed() -> None:
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    rooms = {path.parent.relative_to(ROOT) for name in ROOMS for path in (ROOT / name).rglob("*.py")}
    assert packages == {"softshard", *(f"softshard.{room}".replace("/", ".") for room in rooms)}
    for name in ("softshard", *ROOMS):
        assert (ROOT / name / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"*": ["py.typed"]}


def test_one_name_is_installed() -> None:
    """The folders lie beside softshard/, which has links to them."""
    for name in ROOMS:
        assert (ROOT / "softshard" / name).readlink() == Path("..", name)


def test_the_license_and_what_is_owed_are_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert f"version: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_notice_names_files_that_exist() -> None:
    text = (ROOT / "NOTICE").read_text()
    named = {word.strip("(),.;:\n") for word in text.split() if ".py" in word}
    assert len(named) > 5
    folders = [ROOT, ROOT / "pipeline/views", ROOT / "pipeline/views/kernels"]
    missing = [name for name in named if not any((folder / name).is_file() for folder in folders)]
    assert not missing
