"""Label a random sample of a store again and compare: do its labels belong to these images, views and teachers."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.pipeline.labels.label import make_labeler, open_matching
from softshard.pipeline.labels.labeler import Labeler
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.launch import make_accelerator
from softshard.pipeline.store.store import Store
from softshard.pipeline.store.topk import CODE_MAX, STEPS_PER_NAT, TAIL_OFFSET, Codes
from softshard.pipeline.verify import Report

HALF_STEP = 1 / (2 * STEPS_PER_NAT)
# nats beyond rounding that another batch, thread count or device may change: 8, 11 and 24 bits of precision
TOLERANCE = {"bf16": 0.25, "fp16": 0.05, "float32": 0.01}


def spot_check(recipe: LabelRecipe, sample: int, seed: int) -> Report:
    """Render and label `sample` random labeled views again, and the tail templates of as many images as make `sample`
    views. Raises DataError when the store is not the recipe's, or holds no labels."""
    accelerator = make_accelerator("verify", recipe.precision)
    labeler, manifest = make_labeler(recipe, accelerator)
    store = open_matching(labeler, manifest)
    rng = np.random.default_rng(seed)
    rows, views = _choose(store, sample, rng)
    problems, largest, done = [], 0.0, 0
    for output in labeler.outputs(rows, views[:, None]):
        part = slice(done, done + len(output.rows))
        done = part.stop
        differences = codes_differences(output.logits[:, 0].double().cpu(), _stored(store, rows[part], views[part]))
        largest = max(largest, float(differences.max()))
        for row, view, difference in zip(rows[part], views[part], differences.tolist(), strict=True):
            if not difference <= TOLERANCE[recipe.precision]:
                key = labeler.beton.manifest.keys[row]
                problems.append(
                    f"{store.name}: view {view} of {key}: expected the stored labels, found others, "
                    f"{difference:.3f} nat off; label again"
                )
    template = _template_problems(labeler, store, rng, sample) if store.manifest.template else []
    return Report(f"{sample} views labeled again, {largest:.4f} nat off at most", problems + template)


def codes_differences(logits: Tensor, codes: Codes) -> Tensor:
    """How far, in nats, each row's codes are from being those of the logits: float64 [B], 0 where they are.

    logits float64 [B, C]. It is the largest of: the error of a kept class's log-probability ratio and of the tail's,
    beyond the half step that rounding takes; how much a class that was not kept is more probable than the last one
    that was; how much any is more probable than the first. Saturated codes are not compared.
    """
    index, gap, tail = codes.tensors()
    log_p = torch.log_softmax(logits, dim=1)
    kept = log_p.gather(1, index)
    steps = torch.nn.functional.pad(gap.cumsum(1), (1, 0))
    saturated = torch.nn.functional.pad((gap == CODE_MAX).cumsum(1), (1, 0)) > 0
    ratio = ((kept - kept[:, :1] + steps / STEPS_PER_NAT).abs() - HALF_STEP).masked_fill(saturated, 0).amax(1)
    parts = [ratio, log_p.amax(1) - kept[:, 0]]
    if index.shape[1] < logits.shape[1]:
        others = log_p.scatter(1, index, -torch.inf)
        mass = others.logsumexp(1) - kept[:, 0]
        unsaturated = (tail > 0) & (tail < CODE_MAX)
        stored = (tail.double() - TAIL_OFFSET) / STEPS_PER_NAT
        parts.append(torch.where(unsaturated, (stored - mass).abs() - HALF_STEP, 0.0))
        # the last class kept may be one of several that are equally impossible
        parts.append((others.amax(1) - kept[:, -1]).nan_to_num(nan=0.0))
    return torch.stack(parts).amax(0).clamp(min=0)


def _choose(store: Store, sample: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and view numbers of random labeled views, [sample] each."""
    views, blocks = np.nonzero(store.digests())
    if not len(views):
        raise DataError(f"{store.name}: expected labeled blocks to sample from, found none; label first")
    sizes = np.array([store.rows(int(block)).stop - store.rows(int(block)).start for block in blocks])
    chosen = np.sort(rng.choice(len(views), sample, p=sizes / sizes.sum()))
    rows = blocks[chosen] * store.manifest.block_rows + rng.integers(0, sizes[chosen])
    return rows, views[chosen]


def _stored(store: Store, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Codes:
    """The codes of (row, view) pairs, whose views ascend."""
    return Codes.concatenate([store.read_rows(int(view), rows[views == view]) for view in np.unique(views)])


def _template_problems(labeler: Labeler, store: Store, rng: np.random.Generator, sample: int) -> list[str]:
    """Templates may differ by one step, where the mean lies between two."""
    count = store.manifest.template.views if store.manifest.template else 0
    blocks = np.flatnonzero(store.template_digests())
    if not len(blocks):
        return []
    block = int(rng.choice(blocks))
    span = store.rows(block)
    chosen = rng.integers(0, span.stop - span.start, max(1, sample // count))
    stored, rows = store.read_template(block)[chosen], chosen + span.start
    parts = labeler.labels(rows, np.tile(np.arange(count), (len(rows), 1)), template=True)
    found = np.concatenate([part.template for part in parts if part.template is not None])
    off = np.abs(found.astype(int) - stored).max(axis=1)
    keys = [labeler.beton.manifest.keys[row] for row in rows]
    return [
        f"{store.name}: tail template of {key}: expected the stored one, found another, {steps / 2:g} nat off; "
        "label again"
        for key, steps in zip(keys, off.tolist(), strict=True)
        if steps > 1
    ]
