"""Exported formats: the folder of weights that is always written, and files beside it. Their registry."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.trainer.export.formats.contract import Format
from softshard.trainer.export.formats.coreml_file import load_coreml, write_coreml
from softshard.trainer.export.formats.executorch_file import load_executorch, write_executorch
from softshard.trainer.export.formats.onnx_file import load_onnx, write_int8, write_onnx

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", "onnx", ONNX_PACKAGES, write_onnx, load_onnx),
    "int8": Format("model.int8.onnx", "onnx", ONNX_PACKAGES, write_int8, load_onnx, exact=False, needs=("onnx",)),
    "executorch": Format("model.pte", "executorch", ("executorch",), write_executorch, load_executorch),
    "coreml": Format(
        "model.mlpackage",
        "coreml",
        ("coremltools",),
        write_coreml,
        load_coreml if sys.platform == "darwin" else None,
        exact=False,  # float16
    ),
}


def chosen_formats(names: Sequence[str], library: str) -> list[str]:
    """Choose the formats to write beside the folder of weights: the named ones and those that they are made from.

    Args:
        names: of formats; that of the student's library stands for the folder of weights.
        library: the student's.

    Returns:
        Their names, in the order in which they are written.

    Raises:
        RecipeError: a name is unknown.
        DataError: packages are not installed.
    """
    known = (library, *FORMATS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(
            f"--formats: expected some of {', '.join(known)} for a student of {library}, found {unknown[0]!r}"
        )
    wanted = {needed for name in names if name in FORMATS for needed in (name, *FORMATS[name].needs)}
    chosen = [name for name in FORMATS if name in wanted]
    for name in chosen:
        require(name, FORMATS[name].packages, FORMATS[name].extra)
    return chosen


def require(what: str, packages: Sequence[str], extra: str) -> None:
    """Make sure that the packages of an optional extra are installed.

    Raises:
        DataError: some are not.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise DataError(
            f"{what}: expected {', '.join(packages)}, found no {', '.join(missing)}; "
            f"install with: pip install 'softshard[{extra}]'"
        )
