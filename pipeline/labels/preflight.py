"""A look at a few views before a run that may take days: is the teacher right, how long, how many bytes."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.labels.labeler import LabeledBatch, Labeler
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.store import code_arrays
from softshard.pipeline.store.topk import Codes, decode
from softshard.pipeline.store.zarr_group import compressed_bytes
from softshard.teachers import PUBLISHED

IMAGES = 512
FILE_BYTES = 4096  # what a small file takes on most disks, and what a larger one wastes
FILES_A_BLOCK = 4


@dataclass(frozen=True)
class Preflight:
    """top1: percent of hard labels; confidence: mean probability of the first class; tail: mean mass outside the top
    k; bytes as they are stored; `seconds` each view of an image took one process."""

    images: int
    top1: float
    confidence: float
    tail: float
    bytes_per_view: float
    template_bytes: float
    seconds: float

    def stored_bytes(self, manifest: StoreManifest, views: int) -> int:
        """An estimate for some views of all images, and for the template."""
        blocks = views * -(-manifest.samples // manifest.block_rows)
        content = (views * self.bytes_per_view + self.template_bytes) * manifest.samples
        return int(content) + blocks * FILES_A_BLOCK * FILE_BYTES


def preflight(labeler: Labeler, manifest: StoreManifest) -> Preflight:
    """Label one view of up to IMAGES images, evenly spaced in the file."""
    total, recipe = len(labeler.beton), labeler.recipe
    count = min(IMAGES, total)
    rows, views = np.arange(count) * total // count, np.arange(count)[:, None] % recipe.views.count
    warm = min(recipe.batch_size, count // 2)  # the first batch waits for the decoder, and for what a device prepares
    parts = _labels(labeler, rows[:warm], views[:warm])
    started = time.perf_counter()
    parts += _labels(labeler, rows[warm:], views[warm:])
    seconds = (time.perf_counter() - started) / (count - warm)
    codes = Codes.concatenate([part.codes for part in parts])
    soft = decode(*codes.tensors(), recipe.classes, 1.0)
    arrays = {name: values[None] for name, values in code_arrays(codes).items()}
    if recipe.template:
        arrays["tail_template"] = np.concatenate([part.template for part in parts])  # pyright: ignore
    one_block = {"samples": count, "block_rows": count, "views": recipe.views.model_copy(update={"count": 1})}
    stored = compressed_bytes(manifest.model_copy(update=one_block), arrays)
    template_bytes = stored.pop("tail_template", 0) / count
    return Preflight(
        images=count,
        top1=100 * float(np.concatenate([part.correct for part in parts]).mean()),
        confidence=float(soft.probability[:, 0].mean()),
        tail=float(soft.tail.mean()),
        bytes_per_view=sum(stored.values()) / count,
        template_bytes=template_bytes,
        seconds=seconds,
    )


def _labels(labeler: Labeler, rows: NDArray[np.int64], views: NDArray[np.int64]) -> list[LabeledBatch]:
    return list(labeler.labels(rows, views, labeler.recipe.template is not None)) if len(rows) else []


def check_top1(found: Preflight, minimum: float | None) -> None:
    """Raises DataError when the teachers are not as good as the recipe asks for."""
    if minimum is not None and found.top1 < minimum:
        raise DataError(
            f"teachers: expected a top-1 of min_top1 = {minimum} % on the hard labels, found {found.top1:.1f} % on "
            f"{found.images} views; check mean and std, the order of the classes, and the weights"
        )


def describe_teachers(found: Preflight, manifest: StoreManifest) -> str:
    """One line: what the teachers do on these views, beside what is published for the center of ImageNet's images."""
    published = [
        f"{PUBLISHED[teacher.model].name} {PUBLISHED[teacher.model].top1:.1f} %"
        for teacher in manifest.teachers
        if teacher.library == "timm" and teacher.model in PUBLISHED
    ]
    known = f" (published for ImageNet's center views: {', '.join(published)})" if published else ""
    return (
        f"teachers: top-1 {found.top1:.1f} % on {found.images} views{known}, mean confidence {found.confidence:.2f}, "
        f"{100 * found.tail:.1f} % of the mass outside the top {manifest.top_k}"
    )


def describe_run(found: Preflight, manifest: StoreManifest, views: int, processes: int) -> str:
    """One line: time and bytes of labeling some views of all images."""
    total = manifest.samples * views
    template = f", template {found.template_bytes:.0f} bytes an image" if manifest.template else ""
    return (
        f"estimate: {views} views of {manifest.samples} images, {_duration(total * found.seconds / processes)} at "
        f"{processes / found.seconds:.0f} views/s, {found.stored_bytes(manifest, views) / 1e6:.1f} MB "
        f"({found.bytes_per_view:.1f} bytes a view{template})"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
