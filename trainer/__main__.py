"""python -m trainer VERB: train a student from shards, evaluate it, fold and export it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import INTERRUPTED_STATUS, add_verb, run
from pipeline.files import write_atomically
from pipeline.recipe_file import load_recipe
from trainer.recipe import TrainRecipe


def _train(arguments: argparse.Namespace) -> int:
    from trainer.train import train

    recipe = load_recipe(TrainRecipe, arguments.config, arguments.overrides)
    if train(recipe):
        return 0
    print(f"{recipe.output}: stopped; run the same command again to go on after the last finished epoch")
    return INTERRUPTED_STATUS


def _evaluate(arguments: argparse.Namespace) -> int:
    from trainer.evaluate import evaluate

    recipe = load_recipe(TrainRecipe, arguments.config, arguments.overrides)
    result = evaluate(recipe, arguments.weights)
    figures = f"top-1 {result.top1:.2f} % of {result.images} images, {result.parameters} parameters"
    print(f"{arguments.weights}: {figures}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps(result._asdict()).encode())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from trainer.export import export

    result = export(arguments.run_folder, arguments.out)
    print(
        f"{arguments.out}: {result['parameters_trained']} parameters folded to {result['parameters_folded']}, "
        f"largest relative difference {result['difference']:.1e} in float64"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_verb(
        verbs, "train", "train a student (also under `accelerate launch -m`); goes on where the run stopped", _train
    )
    evaluating = add_verb(verbs, "evaluate", "top-1 of weights on the validation set", _evaluate)
    evaluating.add_argument(
        "--weights", type=Path, required=True, help="a run's model.safetensors, or an exported folder"
    )
    evaluating.add_argument("--json", type=Path, help="write the figures and all predictions to this file")
    exporting = add_verb(verbs, "export", "fold a run's student and write a timm folder", _export, config=False)
    exporting.add_argument("--run", type=Path, required=True, dest="run_folder")
    exporting.add_argument("--out", type=Path, required=True)
    return run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
