"""run -> exported folder: the folded student as its library loads it, other formats, figures and a card."""

import copy
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import atomic_path
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.data.training_set import open_validation_set
from softshard.trainer.export.compare import Comparison, compare
from softshard.trainer.export.formats import FORMATS, chosen_formats
from softshard.trainer.export.formats.contract import InputSpec, Job, Predictor
from softshard.trainer.export.formats.folder import load_folder, write_folder
from softshard.trainer.export.manifest import Exported, FormatFigures, cost_of, save_exported
from softshard.trainer.export.model_card import write_card
from softshard.trainer.loop.run_folder import BEST, CLASSES, RECIPE, WEIGHTS
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import Student, make_student
from softshard.trainer.students import fold

FOLD_PARITY = 1e-9  # relative, in float64
PARITY = 1e-3  # relative, in float32: other runtimes add in another order
CALIBRATION_IMAGES = 256
BATCH_SIZE = 32
LIBRARIES = ("timm", "torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "executorch", "coremltools")


def export(run: Path, out: Path, formats: Sequence[str] = (), best: bool = False) -> Exported:
    """Fold the student of a finished run, write it, read it again and evaluate what was read, on the CPU.

    A folder of weights is always written. Prints a warning when no batch norm of the student has seen an image.

    Args:
        run: the folder of the run.
        out: the new folder; it appears whole or not at all.
        formats: names of further formats, from FORMATS.
        best: take the weights of the best validation so far, not the last ones.

    Returns:
        What was written into export.json, with figures of each format on the run's validation set.

    Raises:
        DataError: there is no finished run, its files do not fit together, the folder exists, a format's packages are
            not installed, or what was written computes something else than the student.
        RecipeError: a format is unknown.
    """
    weights = run / (BEST if best else WEIGHTS)
    recipe = _open_run(run, weights, out)
    chosen = chosen_formats(formats, recipe.student.library)
    validation = open_validation_set(recipe)
    student = make_student(recipe, weights).eval()
    _warn_if_fresh(student, run)
    difference = _fold_difference(student, run, recipe.data.size)
    job = _job(recipe, student, run)
    with atomic_path(out) as folder:
        folder.mkdir()
        figures = _write(job, recipe, folder, chosen)
        exported = Exported(
            student=recipe.student,
            preprocessing=job.preprocessing,
            label_names=job.label_names,
            trained=cost_of(student.network, recipe.data.size),
            folded=cost_of(job.network, recipe.data.size),
            fold_difference=difference,
            images=len(validation),
            formats=_evaluate(job, recipe, validation, folder, figures),
            libraries=_versions(),
        )
        save_exported(folder, exported)
        write_card(folder, exported)
    return exported


def _open_run(run: Path, weights: Path, out: Path) -> TrainRecipe:
    if not all(path.is_file() for path in (run / RECIPE, run / CLASSES, weights)):
        raise DataError(
            f"{run}: expected a finished run with {RECIPE}, {CLASSES} and {weights.name}, found none; "
            "train it to its end first"
        )
    if out.exists():
        raise DataError(f"{out}: expected a new folder, found one that exists; remove it or name another --out")
    return load_recipe(TrainRecipe, run / RECIPE)


def _warn_if_fresh(student: Student, run: Path) -> None:
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if norms and all(_is_fresh(norm) for norm in norms):
        print(
            f"warning: {run}: expected batch norms that have seen images, found all statistics fresh (mean 0, variance "
            "1); what the folded student computes means nothing until it is trained",
            file=sys.stderr,
        )


def _is_fresh(norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


@torch.no_grad()
def _fold_difference(student: Student, run: Path, size: int) -> float:
    """The largest difference of logits that folding makes in float64, relative to the largest logit, on noise.

    Raises:
        DataError: it is more than rounding.
    """
    noise = torch.randint(0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(student).double()
    expected, found = exact(noise), Student(fold(exact.network)).double()(noise)
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= FOLD_PARITY:  # also for nan
        raise DataError(
            f"{run}: expected the folded student to equal the trained one, found a difference of {difference:.1e}"
        )
    return difference


def _job(recipe: TrainRecipe, student: Student, run: Path) -> Job:
    names = tuple((run / CLASSES).read_text(encoding="utf-8").splitlines())
    if len(names) != recipe.student.num_classes:
        raise DataError(
            f"{run / CLASSES}: expected {recipe.student.num_classes} class names, as the student has classes, "
            f"found {len(names)}; restore the file of this run"
        )
    values = timm.data.resolve_model_data_config(student.network)
    mean, std = values["mean"], values["std"]
    pixels = InputSpec(size=recipe.data.size, crop_pct=recipe.data.crop_pct, mean=mean, std=std)

    def calibration() -> Iterator[Tensor]:
        beton = open_beton(recipe.data.train)
        rows = np.linspace(0, len(beton) - 1, min(CALIBRATION_IMAGES, len(beton))).astype(np.int64)
        return (images for images, _ in _batches(recipe, beton, rows, pixels))

    network = fold(student.network).to(memory_format=torch.contiguous_format)
    return Job(network, recipe.student.model, pixels, names, calibration)


def _batches(
    recipe: TrainRecipe, beton: Beton, rows: NDArray[np.int64], pixels: InputSpec
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized center views, float32 [N, 3, S, S], and hard labels, int64 [N]."""
    device = torch.device("cpu")
    loader = ViewLoader(beton, None, pixels.size, BATCH_SIZE, recipe.data.workers, device, pixels.crop_pct)
    for batch in loader.render(rows, CENTER):
        yield pixels.normalize(batch.images), batch.labels


def _write(job: Job, recipe: TrainRecipe, folder: Path, chosen: Sequence[str]) -> dict[str, FormatFigures]:
    """Write the folder of weights and the chosen formats; their files, not yet evaluated."""
    library = recipe.student.library
    weights = write_folder(job, library, folder)
    written = {library: FormatFigures(file=weights.name, bytes=_bytes(weights))}
    for name in chosen:
        path = folder / FORMATS[name].file
        opset = FORMATS[name].write(job, path)
        written[name] = FormatFigures(file=path.name, bytes=_bytes(path), opset=opset)
    return written


def _bytes(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _evaluate(
    job: Job, recipe: TrainRecipe, validation: Beton, folder: Path, written: dict[str, FormatFigures]
) -> dict[str, FormatFigures]:
    """Add figures on the validation set.

    Raises:
        DataError: a file computes something else than the folded student.
    """
    predictors: dict[str, Predictor] = {recipe.student.library: load_folder(folder).eval()}
    for name, wanted in FORMATS.items():
        if name in written and wanted.load:
            predictors[name] = wanted.load(folder / wanted.file, None)
    batches = _batches(recipe, validation, np.arange(len(validation)), job.preprocessing)
    progress = tqdm(batches, "evaluate", -(-len(validation) // BATCH_SIZE), unit="batch")
    found = compare(job.network, predictors, progress)
    for name, comparison in found.items():
        _check(name, comparison)
    return {name: figures.model_copy(update=_figures(found.get(name))) for name, figures in written.items()}


def _figures(comparison: Comparison | None) -> dict[str, float]:
    return comparison._asdict() if comparison else {}


def _check(name: str, comparison: Comparison) -> None:
    exact = name not in FORMATS or FORMATS[name].exact
    if exact and not comparison.difference <= PARITY:
        raise DataError(
            f"{name}: expected the logits of the folded student, found a difference of {comparison.difference:.1e}; "
            "leave the format out of --formats, or use the versions in constraints.txt"
        )


def _versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
