"""What runs beside a checkout (workflows, hooks, .ci/run) calls only targets, scripts and versions that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT
from ruamel.yaml import YAML

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)


def unknown_calls(script: str) -> list[str]:
    """The make targets and scripts that a text names and that do not exist."""
    targets = re.findall(r"(?:\bmake|\$\(MAKE\) --no-print-directory) ([a-z-]+)", script)
    scripts = re.findall(r"(?:scripts|benchmarks)/[\w/]+\.(?:py|sh)\b", script)
    return sorted(set(targets) - TARGETS) + sorted(name for name in scripts if not (ROOT / name).is_file())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_exists(path: Path) -> None:
    workflow = read(path)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    calls = [step["run"] for step in steps if "run" in step]
    assert any("make " in call for call in calls)
    assert not [unknown for call in calls for unknown in unknown_calls(call)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_end(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_workflow_runs_all_pythons_that_are_claimed() -> None:
    jobs = read(ROOT / ".github/workflows/ci.yml")["jobs"]
    versions = jobs["tests"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    text = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.14"' in text
    assert [f'"Programming Language :: Python :: {version}"' in text for version in versions] == [True] * 3


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "CONTRIBUTING.md", ".github/pull_request_template.md"])
def test_targets_and_scripts_that_are_named_exist(name: str) -> None:
    assert not unknown_calls((ROOT / name).read_text())


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_complete(path: Path) -> None:
    form = read(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names) > 1


def test_hooks_are_pinned_and_of_the_versions_that_the_tests_use() -> None:
    hooks = {hook["repo"].split("/")[-1]: hook for hook in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", hook["rev"]) for hook in hooks.values())
    assert f"ruff=={hooks['ruff-pre-commit']['rev'][1:]}\n" in (ROOT / "constraints.txt").read_text()
