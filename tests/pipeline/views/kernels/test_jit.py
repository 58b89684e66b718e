"""What is kept on disk is kept under a digest of all that it is compiled from."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest
from helpers.paths import ROOT

from softshard.pipeline.views.kernels import jit
from softshard.pipeline.views.kernels.jit import UNCOMPILED, compiled_sources, sources_digest

VIEWS = ROOT / "pipeline" / "views"
SOURCES = sorted(VIEWS.rglob("*.py"))
COVERED = {Path(path.resolve()) for path in compiled_sources()}


def module_of(path: Path) -> ModuleType:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(("softshard", *parts)).removesuffix(".__init__"))


def imported(path: Path) -> set[Path]:
    """The modules of views/ that a source imports, or takes names from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in names if name.startswith("softshard.")}
    return files & set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(VIEWS)))
def test_modules_with_compiled_functions_are_covered(path: Path) -> None:
    compiled = [name for name, value in vars(module_of(path)).items() if hasattr(value, "py_func")]
    own = [name for name in compiled if vars(module_of(path))[name].__module__ == module_of(path).__name__]
    assert not own or path in COVERED
    assert VIEWS / "kernels" / "jit.py" not in imported(path) or path in COVERED


@pytest.mark.parametrize("path", sorted(COVERED), ids=lambda path: str(path.relative_to(VIEWS)))
def test_covered_modules_take_functions_and_constants_from_covered_ones_alone(path: Path) -> None:
    assert imported(path) <= COVERED


def test_the_modules_that_are_left_out_exist() -> None:
    assert {str(path.relative_to(VIEWS)) for path in set(SOURCES) - COVERED} == UNCOMPILED
    assert {"render.py", "parameters.py", "kernels/color.py"} <= {str(path.relative_to(VIEWS)) for path in COVERED}


def test_the_digest_is_of_every_covered_module(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = compiled_sources()
    digests = {sources_digest()}
    for left_out in paths:
        monkeypatch.setattr(jit, "compiled_sources", lambda left_out=left_out: [p for p in paths if p != left_out])
        digests.add(sources_digest())
    empty = sum(not path.read_bytes() for path in paths)
    assert len(digests) == 1 + len(paths) - empty
