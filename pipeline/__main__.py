"""python -m pipeline VERB: pack images, label views, look at what came of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from softshard.pipeline.cli import INTERRUPTED_STATUS, Verbs, add_verb, heavy_imports, make_parser, run
from softshard.pipeline.recipes.recipe import LabelRecipe, PackRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe
from softshard.pipeline.runtime.errors import DataError, RecipeError

DAMAGED_STATUS = 1


def _pack(arguments: argparse.Namespace) -> int:
    from softshard.pipeline.images.pack import pack

    recipe = load_recipe(PackRecipe, arguments.config, arguments.overrides)
    manifest = pack(recipe)
    converted = ", ".join(f"{count} {kind}" for kind, count in manifest.converted.items())
    print(
        f"{recipe.output}: {len(manifest.keys)} images in {len(manifest.classes)} classes, "
        f"{manifest.beton_bytes / 1e6:.1f} MB; converted: {converted or 'none'}; skipped: {len(manifest.skipped)}"
    )
    return 0


def _label(arguments: argparse.Namespace) -> int:
    with heavy_imports():
        from softshard.pipeline.labels.label import estimate, label
        from softshard.pipeline.store.store import open_store

    recipe = load_recipe(LabelRecipe, arguments.config, arguments.overrides)
    if arguments.estimate:
        print(estimate(recipe, arguments.views))
        return 0
    whole = label(recipe, arguments.views)
    store = open_store(recipe.store)
    digests, count = store.digests(), store.manifest.views.count
    labeled, blocks = int((digests != 0).sum()), digests.size
    if not whole:
        print(f"{recipe.store}: stopped with {labeled} of {blocks} blocks labeled; run the same command again to go on")
        return INTERRUPTED_STATUS
    part = "" if labeled == blocks else f"{labeled} of {blocks} blocks of "
    size = f"{store.bytes_per_view(digests):.2f} bytes a view"
    print(f"{recipe.store}: {part}{count} views of {store.manifest.samples} images, {size}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from softshard.pipeline.verify import verify

    path = _existing(arguments.path)
    if (arguments.sample is None) != (arguments.config is None):
        raise RecipeError("verify: expected --sample N together with --config F, the label recipe, found one of them")
    report = verify(path)
    if arguments.sample is not None and not report.problems:
        from softshard.pipeline.labels.spot_check import spot_check

        recipe = load_recipe(LabelRecipe, arguments.config, [*arguments.overrides, ("store", json.dumps(path))])
        report = spot_check(recipe, arguments.sample, arguments.seed)
    for problem in report.problems:
        print(problem)
    state = f"{len(report.problems)} not whole" if report.problems else "whole"
    print(f"{path}: {report.checked}; {state}")
    return DAMAGED_STATUS if report.problems else 0


def _show(arguments: argparse.Namespace) -> int:
    from softshard.pipeline.show import describe, summary

    document = describe(_existing(arguments.path))
    print(json.dumps(document, indent=2) if arguments.json else summary(document))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from softshard.pipeline.shards.convert import convert

    print(convert(arguments.source, arguments.target, arguments.images, arguments.shard_samples))
    return 0


def _render(arguments: argparse.Namespace) -> int:
    from softshard.pipeline.views.contact_sheet import make_sheet

    recipe = load_recipe(LabelRecipe, arguments.config, arguments.overrides)
    print(make_sheet(recipe, arguments.keys, arguments.views, arguments.out, arguments.size))
    return 0


def _existing(path: str) -> str:
    if "://" not in path and not Path(path).exists():
        raise DataError(f"{path}: expected a .beton, a store or shards, found nothing there; check the path")
    return path


def _views(text: str) -> range:
    """'3-5' -> range(3, 6), '3' -> range(3, 4)."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
        raise argparse.ArgumentTypeError(f"expected A-B or A, the numbers of views, found {text!r}")
    views = range(int(first), int(last or first) + 1)
    if not views:
        raise argparse.ArgumentTypeError(f"expected A-B with A at most B, found {text!r}")
    return views


def add_verbs(verbs: Verbs) -> None:
    add_verb(verbs, "pack", "pack an image data set into a .beton with a manifest", _pack)
    label = add_verb(verbs, "label", "label views with teachers (also under `accelerate launch -m`)", _label)
    label.add_argument("--views", type=_views, metavar="A-B", help="these views alone; other launches do the others")
    label.add_argument("--estimate", action="store_true", help="time and bytes of the run, from a few measured batches")
    help = "check every checksum, image and block of a .beton, a store or shards; 0: whole, 1: the list of what is not"
    verify = add_verb(verbs, "verify", help, _verify, config=False)
    verify.add_argument("path")
    verify.add_argument("--sample", type=int, metavar="N", help="also label N random views again and compare")
    verify.add_argument(
        "--config", type=Path, help="the label recipe, for --sample; --section.key VALUE overrides a key"
    )
    verify.add_argument("--seed", type=int, default=0, help="of the random choice")
    show = add_verb(verbs, "show", "what a .beton, a store or shards hold", _show, config=False)
    show.add_argument("path")
    show.add_argument("--json", action="store_true", help="one JSON document, for programs")
    convert = add_verb(verbs, "convert", "a store to WebDataset shards, or back", _convert, config=False)
    convert.add_argument("source", help="a store, or a folder of shards")
    convert.add_argument("target", help="a folder for shards, or a new store, which ends in .zarr")
    convert.add_argument("--images", type=Path, metavar="BETON", help="put the images and hard labels into the shards")
    convert.add_argument("--shard-samples", type=int, default=10000, metavar="N", help="images in each shard")
    render = add_verb(verbs, "render", "views of a label recipe as a picture, with their parameters", _render)
    render.add_argument("--keys", action="append", required=True, help="images, with commas between them")
    render.add_argument("--views", required=True, help="numbers and ranges: 0-7 or 0,3,5-6")
    render.add_argument("--out", type=Path, required=True, help="the .png to write")
    render.add_argument("--size", type=int, help="pixels of a view's side, instead of the teacher's")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(make_parser("python -m pipeline", __doc__, [add_verbs]), arguments)


if __name__ == "__main__":
    sys.exit(main())
