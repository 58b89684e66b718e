"""python -m trainer VERB: train a student from soft labels, evaluate it, fold and export it, time it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from softshard.pipeline.cli import INTERRUPTED_STATUS, Verbs, add_verb, heavy_imports, make_parser, run
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.pipeline.runtime.files import write_atomically


def _train(arguments: argparse.Namespace) -> int:
    with heavy_imports():
        from softshard.trainer.loop.train import train
        from softshard.trainer.recipe import TrainRecipe

    recipe = load_recipe(TrainRecipe, arguments.config, arguments.overrides)
    if train(recipe):
        return 0
    if os.environ.get("RANK", "0") == "0":
        print(f"{recipe.output}: stopped; run the same command again to resume with the next batch")
    return INTERRUPTED_STATUS


def _evaluate(arguments: argparse.Namespace) -> int:
    with heavy_imports():
        from softshard.trainer.evaluate import evaluate
        from softshard.trainer.recipe import TrainRecipe

    recipe = load_recipe(TrainRecipe, arguments.config, arguments.overrides)
    result = evaluate(recipe, arguments.weights)
    top1, top5, loss = result.scores
    print(
        f"{arguments.weights}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {result.images} images, "
        f"{result.parameters} parameters"
    )
    if arguments.json:
        figures = result._asdict() | {"scores": result.scores._asdict()}
        write_atomically(arguments.json, json.dumps(figures).encode())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with heavy_imports():
        from softshard.trainer.export.export import export

    exported = export(arguments.run_folder, arguments.out, arguments.formats, arguments.best)
    print(
        f"{arguments.out}: {exported.trained.parameters} parameters folded to {exported.folded.parameters}, "
        f"largest relative difference {exported.fold_difference:.1e} in float64"
    )
    for name, figures in exported.formats.items():
        found = "not evaluated, since this system does not run it"
        if figures.top1 is not None:
            found = f"top-1 {figures.top1:.2f} %, {figures.agreement:.2f} % of {exported.images} predicted the same"
        print(f"{name}: {arguments.out / figures.file}, {figures.bytes / 1e6:.1f} MB, {found}")
    return 0


def _latency(arguments: argparse.Namespace) -> int:
    from softshard.trainer.export.latency import latency, plot, save_json, table

    latencies = latency(arguments.export, arguments.rounds)
    print(table(latencies))
    if arguments.json:
        save_json(latencies, arguments.json)
    if arguments.plot:
        plot(latencies, arguments.plot)
    return 0


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of training to a command."""
    add_verb(verbs, "train", "train a student (also under `accelerate launch -m`); resumes a run that stopped", _train)
    evaluating = add_verb(verbs, "evaluate", "top-1, top-5 and loss of weights on the validation set", _evaluate)
    evaluating.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="a run's model.safetensors or best.safetensors, or an exported folder",
    )
    evaluating.add_argument("--json", type=Path, help="write the figures and all predictions to this file")
    exporting = add_verb(verbs, "export", "fold a run's student, write and evaluate it", _export, config=False)
    exporting.add_argument("--run", type=Path, required=True, dest="run_folder")
    exporting.add_argument("--out", type=Path, required=True)
    exporting.add_argument(
        "--best", action="store_true", help="the weights of the best validation, not those of the end"
    )
    exporting.add_argument(
        "--formats",
        type=lambda text: text.split(","),
        default=[],
        help="comma-separated: timm or torchvision (always written), onnx, int8, executorch, coreml",
    )
    timing = add_verb(verbs, "latency", "time an exported student on one thread", _latency, config=False)
    timing.add_argument("--export", type=Path, required=True, help="a folder that export wrote")
    timing.add_argument("--rounds", type=int, default=50, help="how often each format is timed, in turns")
    timing.add_argument("--json", type=Path, help="write the figures of all rounds to this file")
    timing.add_argument("--plot", type=Path, help="write a PNG of latency against MACs to this file")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(make_parser("python -m trainer", __doc__, [add_verbs]), arguments)


if __name__ == "__main__":
    sys.exit(main())
