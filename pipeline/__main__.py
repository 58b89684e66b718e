"""python -m pipeline VERB: pack images, label views, look at what came of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import INTERRUPTED_STATUS, add_verb, run
from pipeline.errors import DataError
from pipeline.recipe import LabelRecipe, PackRecipe
from pipeline.recipe_file import load_recipe

DAMAGED_STATUS = 1


def _pack(arguments: argparse.Namespace) -> int:
    from pipeline.pack import pack

    recipe = load_recipe(PackRecipe, arguments.config, arguments.overrides)
    manifest = pack(recipe)
    converted = ", ".join(f"{count} {kind}" for kind, count in manifest.converted.items())
    print(
        f"{recipe.output}: {len(manifest.keys)} images in {len(manifest.classes)} classes, "
        f"{manifest.beton_bytes / 1e6:.1f} MB; converted: {converted or 'none'}; skipped: {len(manifest.skipped)}"
    )
    return 0


def _label(arguments: argparse.Namespace) -> int:
    from pipeline.label import label
    from pipeline.store import open_store

    recipe = load_recipe(LabelRecipe, arguments.config, arguments.overrides)
    whole = label(recipe)
    store = open_store(Path(recipe.store))
    labelled, blocks = int(store.coverage().sum()), recipe.views.count * store.blocks
    if not whole:
        print(
            f"{recipe.store}: stopped with {labelled} of {blocks} blocks labelled; run the same command again to go on"
        )
        return INTERRUPTED_STATUS
    size = f"{store.bytes_per_view():.2f} bytes a view"
    print(f"{recipe.store}: {recipe.views.count} views of {store.manifest.samples} images, {size}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.verify import verify

    report = verify(_existing(arguments.path))
    for problem in report.problems:
        print(problem)
    state = f"{len(report.problems)} not whole" if report.problems else "whole"
    print(f"{arguments.path}: {report.checked}; {state}")
    return DAMAGED_STATUS if report.problems else 0


def _show(arguments: argparse.Namespace) -> int:
    from pipeline.show import describe, summary

    document = describe(_existing(arguments.path))
    print(json.dumps(document, indent=2) if arguments.json else summary(document))
    return 0


def _render(arguments: argparse.Namespace) -> int:
    from pipeline.sheet import make_sheet

    recipe = load_recipe(LabelRecipe, arguments.config, arguments.overrides)
    print(make_sheet(recipe, arguments.keys, arguments.views, arguments.out, arguments.size))
    return 0


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: expected a .beton or a store of labels, found nothing there; check the path")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_verb(verbs, "pack", "pack an image data set into a .beton with a manifest", _pack)
    add_verb(verbs, "label", "label views with a teacher (also under `accelerate launch -m`)", _label)
    help = "check every checksum, image and block of a .beton or a store; 0: whole, 1: the list of what is not"
    add_verb(verbs, "verify", help, _verify, config=False).add_argument("path", type=Path)
    show = add_verb(verbs, "show", "what a .beton or a store holds", _show, config=False)
    show.add_argument("path", type=Path)
    show.add_argument("--json", action="store_true", help="one JSON document, for programs")
    render = add_verb(verbs, "render", "views of a label recipe as a picture, with their parameters", _render)
    render.add_argument("--keys", action="append", required=True, help="images, with commas between them")
    render.add_argument("--views", required=True, help="numbers and ranges: 0-7 or 0,3,5-6")
    render.add_argument("--out", type=Path, required=True, help="the .png to write")
    render.add_argument("--size", type=int, help="pixels of a view's side, instead of the teacher's")
    return run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
