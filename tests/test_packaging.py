"""What an installation must bring beside the code."""

import tomllib

from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed_and_typed() -> None:
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    top = {package.split(".")[0] for package in packages}
    found = {path.parent.relative_to(ROOT) for name in top for path in (ROOT / name).rglob("*.py")}
    assert packages == {str(folder).replace("/", ".") for folder in found}
    for name in top:
        assert (ROOT / name / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"*": ["py.typed"]}


def test_the_licence_and_what_is_owed_are_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert f"version: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_notice_names_files_that_exist() -> None:
    text = (ROOT / "NOTICE").read_text()
    named = {word.strip("(),.;:\n") for word in text.split() if ".py" in word}
    assert len(named) > 5
    folder = ROOT / "pipeline/views"
    missing = [name for name in named if not (ROOT / name).is_file() and not (folder / name).is_file()]
    assert not missing
