"""run -> folded student in a folder that stock timm loads: timm.create_model('local-dir:PATH', pretrained=True)."""

import copy
import shutil
import tempfile
from pathlib import Path

import timm.models
import torch

from pipeline.errors import DataError
from pipeline.recipe_file import load_recipe
from trainer.checkpoint import CLASSES, RECIPE, WEIGHTS
from trainer.recipe import TrainRecipe
from trainer.student import Student, make_student
from trainer.students import fold

PARITY = 1e-9  # relative, in float64


def export(run: Path, out: Path) -> dict[str, float | int]:
    """Fold a finished run's student and write it as a timm folder.

    Raises DataError when there is no finished run, the folder exists, or folded and trained student differ.
    """
    if not (run / RECIPE).is_file() or not (run / WEIGHTS).is_file():
        raise DataError(
            f"{run}: expected a finished run with {RECIPE} and {WEIGHTS}, found none; train it to its end first"
        )
    if out.exists():
        raise DataError(f"{out}: expected a new folder, found one that exists; remove it or name another --out")
    recipe = load_recipe(TrainRecipe, run / RECIPE)
    student = make_student(recipe, run / WEIGHTS).eval()
    folded = Student(fold(student.network))
    difference = _difference(student, recipe.data.size)
    if difference > PARITY:
        raise DataError(
            f"{run}: expected the folded student to equal the trained one, found a difference of {difference:.1e}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_timm(recipe, folded, run, partial)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = {
        name: sum(p.numel() for p in model.parameters()) for name, model in (("trained", student), ("folded", folded))
    }
    return {"parameters_trained": count["trained"], "parameters_folded": count["folded"], "difference": difference}


@torch.no_grad()
def _difference(student: Student, size: int) -> float:
    """Largest difference of logits that folding makes in float64, relative to the largest logit, on noise."""
    noise = torch.randint(0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(student).double()
    expected, found = exact(noise), Student(fold(exact.network)).double()(noise)
    return float((expected - found).abs().max() / expected.abs().max())


def _write_timm(recipe: TrainRecipe, student: Student, run: Path, folder: Path) -> None:
    settings = {
        "input_size": (3, recipe.data.size, recipe.data.size),
        "crop_pct": recipe.data.crop_pct,
        "mean": tuple((student.mean / 255).flatten().tolist()),
        "std": tuple((student.std / 255).flatten().tolist()),
        "label_names": (run / CLASSES).read_text(encoding="utf-8").splitlines(),
    }
    network = student.network.to(memory_format=torch.contiguous_format)
    timm.models.save_for_hf(network, str(folder), model_config={"pretrained_cfg": settings}, safe_serialization=True)
