"""The floor plan, read from the source: which room may import which, no circles, one home for each heavy library, and
rooms and modules that one can live in.

A room is a folder, or a module that lies directly in a package.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGES = ("teachers", "pipeline", "trainer")
MOST_FILES, MOST_LINES = 12, 300

_BASE = {"pipeline/runtime", "pipeline/recipes"}
_VIEWS = {*_BASE, "pipeline/images", "pipeline/views", "pipeline/views/kernels"}
_CONTRACTS = {*_VIEWS, "pipeline/store", "pipeline/cli"}  # what a student's machine needs of the pipeline
MAY_IMPORT = {
    "teachers": set(),
    "pipeline/runtime": set(),
    "pipeline/recipes": {"pipeline/runtime"},
    "pipeline/cli": _BASE,
    "pipeline/images/sources": _BASE,
    "pipeline/images": {*_BASE, "pipeline/images/sources"},
    "pipeline/views/kernels": set(),
    "pipeline/views": {*_BASE, "pipeline/images", "pipeline/views/kernels"},
    "pipeline/store": {*_BASE, "pipeline/images"},
    "pipeline/shards": {*_BASE, "pipeline/images", "pipeline/images/sources", "pipeline/store"},
    "pipeline/verify": {*_BASE, "pipeline/images", "pipeline/store", "pipeline/shards"},
    "pipeline/show": {*_BASE, "pipeline/images", "pipeline/store", "pipeline/shards"},
    "pipeline/labels": {*_VIEWS, "pipeline/store", "teachers"},
    "trainer/losses": {"pipeline/store"},
    "trainer/students/fused": set(),
    "trainer/students": {"pipeline/runtime", "trainer/students/fused", "teachers/weights"},
    "trainer/recipe": {*_BASE, "trainer/losses", "trainer/students", "trainer/students/fused"},
    "trainer/student": {"pipeline/runtime", "trainer/recipe", "trainer/students", "teachers/weights"},
    "trainer/data": {*_CONTRACTS, "trainer/recipe", "trainer/losses"},
    "trainer/loop": {
        *_CONTRACTS, "trainer/recipe", "trainer/losses", "trainer/student", "trainer/students", "trainer/data",
    },
    "trainer/export/formats": {*_BASE, "trainer/students", "teachers/weights"},
    "trainer/export": {
        *_CONTRACTS, "trainer/recipe", "trainer/student", "trainer/students", "trainer/data", "trainer/loop",
        "trainer/export/formats",
    },
    "trainer/evaluate": {
        *_CONTRACTS, "trainer/recipe", "trainer/student", "trainer/data", "trainer/loop", "trainer/export/formats",
    },
}  # fmt: skip
HOMES = {
    "ffcv": {"pipeline/images/ffcv_bridge.py"},
    "zarr": {"pipeline/store/zarr_group.py"},
    "obstore": {"pipeline/store/location.py", "pipeline/store/zarr_group.py"},
    "numcodecs": {"pipeline/shards/format.py"},
    "webdataset": set(),  # stock webdataset reads the shards; nothing here needs it
    "pyarrow": {"pipeline/images/sources/parquet.py"},
    "onnx": {"trainer/export/formats/onnx_file.py"},
    "onnxruntime": {"trainer/export/formats/onnx_file.py"},
    "onnxscript": set(),  # torch.onnx needs it
    "executorch": {"trainer/export/formats/executorch_file.py"},
    "coremltools": {"trainer/export/formats/coreml_file.py"},
    "matplotlib": {"trainer/loop/curves.py", "trainer/export/latency.py"},
    "triton": {"trainer/students/fused/depthwise_triton.py"},
}
SOURCES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FOLDERS = sorted(
    {path.parent for path in SOURCES} | {path.parent.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py")}
)


@cache
def imports(path: Path) -> list[str]:
    """The dotted names that a source imports, those inside functions, too."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_imports(path: Path) -> Iterator[Path]:
    """The sources of this project that a source imports."""
    for name in imports(path):
        assert name.split(".")[0] not in PACKAGES, f"{path} imports {name}; import softshard.{name}"
        if name.startswith("softshard."):
            yield _source(name.split(".")[1:])


def _source(parts: list[str]) -> Path:
    """The module of a dotted name, which may go on with a name inside it."""
    while True:
        for path in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
            if path in SOURCES:
                return path
        assert parts, "no such module"
        parts = parts[:-1]


def room(path: Path) -> str:
    alone = len(path.parts) == 2 and path.name != "__init__.py"
    return str(path.with_suffix("") if alone else path.parent)


def allowed(path: Path, imported: Path) -> bool:
    own, other = room(path), room(imported)
    if path.name == "__main__.py" or own == other or (own.startswith("teachers") and other.startswith("teachers")):
        return True
    return other in MAY_IMPORT[own] or other.split("/")[0] in MAY_IMPORT[own]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_follow_the_plan(path: Path) -> None:
    refused = [str(imported) for imported in own_imports(path) if not allowed(path, imported)]
    assert not refused, f"{path} imports {refused}"
    for name in imports(path):
        home = HOMES.get(name.split(".")[0])
        assert home is None or str(path) in home, f"{path} imports {name}"


@pytest.mark.parametrize("node_of", [room, str], ids=["rooms", "modules"])
def test_there_are_no_circles(node_of) -> None:
    arrows: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.name != "__init__.py":  # a face hands on the names of its rooms, and stands for none of them
            arrows.setdefault(node_of(path), set()).update(node_of(other) for other in own_imports(path))
    arrows = {node: others - {node} for node, others in arrows.items()}
    while free := {node for node, others in arrows.items() if not others & arrows.keys()}:
        arrows = {node: others for node, others in arrows.items() if node not in free}
    assert not arrows, "these import each other, or something that does"


def test_the_plan_names_rooms_that_exist() -> None:
    assert {room(path) for path in SOURCES if room(path).count("/")} >= MAY_IMPORT.keys() - {"teachers"}
    assert len(SOURCES) > 20
    assert any("ffcv" in name for path in SOURCES for name in imports(path))


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".c", ".h")]
    assert len(files) <= MOST_FILES, "past the number at which a folder should be divided"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_stay_readable(path: Path) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MOST_LINES, "past the size at which a module should be redesigned"
