"""What a packed file, a store or shards are, as one document for programs and a summary for people."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.beton import Beton, is_beton, open_beton
from softshard.pipeline.runtime.documents import flatten
from softshard.pipeline.runtime.errors import few
from softshard.pipeline.shards.format import is_shards, open_shards
from softshard.pipeline.shards.reader import shards_bytes
from softshard.pipeline.store.store import Store, open_store
from softshard.pipeline.store.topk import decode

FIRST = 5  # classes and skipped images that the summary names


def describe(path: str) -> dict[str, Any]:
    """A .beton, shards, or a store as plain data.

    Args:
        path: A path, or an address of a store.

    Raises:
        DataError: When there is nothing to read.
        FormatError: For damage to what was read: manifests, tables, digests.
    """
    if is_shards(path):
        return _shards(Path(path))
    return _beton(open_beton(path)) if is_beton(path) else _store(open_store(path))


def summary(document: dict[str, Any]) -> str:
    """The document that `describe` gives for people: `name  value` lines."""
    lines = {"beton": _beton_lines, "store": _store_lines, "shards": _shard_lines}[document["kind"]](document)
    return "\n".join(f"{name:12} {value}" for name, value in lines)


def _beton(beton: Beton) -> dict[str, Any]:
    manifest = beton.manifest
    counts = np.bincount(beton.labels, minlength=len(manifest.classes))
    return {
        "kind": "beton",
        "path": str(beton.path),
        "images": len(beton),
        "bytes": manifest.beton_bytes,
        "image_bytes": _range(beton.lengths),
        "width": _range(beton.widths),
        "height": _range(beton.heights),
        "classes": [{"name": name, "images": int(count)} for name, count in zip(manifest.classes, counts, strict=True)],
        "converted": manifest.converted,
        "skipped": list(manifest.skipped),
        "recipe": manifest.recipe.model_dump(mode="json"),
        "libraries": manifest.libraries,
    }


def _store(store: Store) -> dict[str, Any]:
    digests = store.digests()
    return {
        "kind": "store",
        "path": store.name,
        "blocks": store.blocks,
        "coverage": np.count_nonzero(digests, axis=1).tolist(),
        "templates": int(np.count_nonzero(store.template_digests())) if store.manifest.template else None,
        "views": _views(store, digests),
        "bytes": store.stored_bytes(),
        "bytes_per_view": store.bytes_per_view(digests),
        "manifest": store.manifest.model_dump(mode="json"),
    }


def _shards(folder: Path) -> dict[str, Any]:
    manifest = open_shards(folder)
    return {
        "kind": "shards",
        "path": str(folder),
        "images": manifest.images,
        "shards": [shard.model_dump() for shard in manifest.shards],
        "bytes": shards_bytes(folder, manifest),
        "manifest": manifest.labels.model_dump(mode="json"),
    }


def _views(store: Store, digests: NDArray[np.uint64]) -> list[dict[str, Any]]:
    """Figures of each view of which something is labeled, from one of its blocks, a different one for each view."""
    figures = []
    for view, blocks in enumerate(digests):
        labeled = np.flatnonzero(blocks)
        if len(labeled):
            codes = store.read_block(view, int(labeled[view % len(labeled)]))
            soft = decode(*codes.tensors(), store.manifest.classes, 1.0)
            means = {"confidence": soft.probability[:, 0].mean(), "tail": soft.tail.mean()}
            figures.append({"view": view} | {name: float(mean) for name, mean in means.items()})
    return figures


def _beton_lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    classes, skipped = document["classes"], document["skipped"]
    counts = _range(np.array([entry["images"] for entry in classes]))
    return [
        ("packed file", document["path"]),
        ("images", f"{document['images']} in {_megabytes(document['bytes'])}"),
        ("image bytes", _words(document["image_bytes"])),
        ("width", _words(document["width"])),
        ("height", _words(document["height"])),
        ("classes", f"{len(classes)}; images in each: {_words(counts)}"),
        ("", few([f"{entry['name']} ({entry['images']})" for entry in classes], FIRST)),
        ("converted", ", ".join(f"{count} {kind}" for kind, count in document["converted"].items()) or "none"),
        ("skipped", f"{len(skipped)}: {few(skipped, FIRST)}" if skipped else "none"),
        *_leaves("recipe", document["recipe"]),
        ("libraries", ", ".join(f"{name} {version}" for name, version in document["libraries"].items())),
    ]


def _shard_lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    contents = "labels, images and hard labels" if document["images"] else "labels alone"
    return [
        ("shards", document["path"]),
        ("contents", f"{contents}; {len(document['shards'])} tars, {_megabytes(document['bytes'])}"),
        *_manifest_lines(document["manifest"]),
    ]


def _store_lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    manifest, blocks = document["manifest"], document["blocks"]
    stored, template = dict(document["bytes"]), []
    if manifest["template"]:
        count = stored.pop("tail_template")
        state = "whole" if document["templates"] == blocks else f"{document['templates']} of {blocks} blocks"
        template = [
            ("template", f"{_megabytes(count)}, {count / manifest['samples']:.0f} bytes for each image; {state}")
        ]
    size = f"{_megabytes(sum(stored.values()))}, {document['bytes_per_view']:.2f} bytes for each image and view"
    return [
        ("store", document["path"]),
        ("codes", size),
        *template,
        *[("coverage", line) for line in _coverage(document["coverage"], blocks)],
        *_view_lines(document["views"]),
        *_manifest_lines(manifest),
    ]


def _manifest_lines(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("labels", f"top {manifest['top_k']} of {manifest['classes']} classes, {manifest['samples']} images"),
        *_leaves("views", manifest["views"]),
        *_leaves("template", manifest["template"]),
        *[(name, str(manifest[name])) for name in ("ensemble", "flip_average", "precision")],
        *[line for teacher in manifest["teachers"] for line in _leaves("teacher", teacher)],
        ("libraries", ", ".join(f"{name} {version}" for name, version in manifest["libraries"].items())),
    ]


def _view_lines(views: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The ranges of the figures over all views; a view that stands out is one to look at."""
    words = {"confidence": "mean probability of the first class", "tail": "mean mass outside the top k"}
    lines = []
    for name, text in words.items() if views else ():
        values = [view[name] for view in views]
        lines.append((name, f"{text}: {min(values):.3f} to {max(values):.3f} over the views"))
    return lines


def _coverage(labeled: Sequence[int], blocks: int) -> list[str]:
    """['views 0-11: whole', 'view 12: 3 of 40 blocks', 'views 13-299: not labeled']."""
    lines, first = [], 0
    for done, views in groupby(labeled):
        last = first + len(list(views)) - 1
        which = f"view {first}" if first == last else f"views {first}-{last}"
        state = "whole" if done == blocks else f"{done} of {blocks} blocks" if done else "not labeled"
        lines.append(f"{which}: {state}")
        first = last + 1
    return lines


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
    return [(leaf, "null" if found is None else str(found)) for leaf, found in flatten(value, name).items()]


def _range(values: NDArray[np.int64]) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _words(values: dict[str, float]) -> str:
    return f"{values['min']:g} to {values['max']:g}, median {values['median']:g}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
