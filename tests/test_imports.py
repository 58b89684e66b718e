"""The direction teachers <- pipeline <- trainer, and one home for each heavy library, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("teachers", "pipeline", "trainer")
MAY_IMPORT = {"teachers": set(), "pipeline": {"teachers"}, "trainer": {"pipeline"}}
HOMES = {
    "ffcv": {"pipeline/beton.py", "pipeline/loader.py"},
    "zarr": {"pipeline/zarr_store.py"},
    "obstore": {"pipeline/places.py", "pipeline/zarr_store.py"},
    "numcodecs": {"pipeline/wds_store.py"},
    "webdataset": set(),  # stock webdataset reads the shards; nothing here needs it
    "pyarrow": {"pipeline/parquet.py"},
    "onnx": {"trainer/formats/onnx_file.py"},
    "onnxruntime": {"trainer/formats/onnx_file.py"},
    "onnxscript": set(),  # torch.onnx needs it
    "executorch": {"trainer/formats/executorch_file.py"},
    "coremltools": {"trainer/formats/coreml_file.py"},
    "matplotlib": {"trainer/curves.py", "trainer/latency.py"},
    "triton": {"trainer/students/depthwise_triton.py"},
}
# what a student's machine needs of the pipeline: its contracts, never the stages that make them
CONTRACTS = {
    "batch", "beton", "cli", "errors", "files", "launch", "loader", "manifest", "probes", "recipe", "recipe_file",
    "store", "topk", "views",
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction(path: Path) -> None:
    relative = path.relative_to(ROOT)
    package = relative.parts[0]
    for name in _imports(path):
        top = name.split(".")[0]
        if top in PACKAGES and top != package:
            assert top in MAY_IMPORT[package], f"{relative} imports {name}"
        if package == "trainer" and top == "pipeline":
            assert name.split(".")[1] in CONTRACTS, f"{relative} imports {name}"
        if top in HOMES:
            assert str(relative) in HOMES[top], f"{relative} imports {name}"


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 20
    assert any("ffcv" in name for path in SOURCES for name in _imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320, "past the size at which a module should be redesigned"
