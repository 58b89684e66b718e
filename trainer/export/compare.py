"""Predictors side by side: the formats of an export against the student that they were made from."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softshard.trainer.export.formats.contract import Predictor


class Comparison(NamedTuple):
    """top1, and agreement of predictions with those of a reference, in percent; the largest difference from its logits,
    relative to the largest of them."""

    top1: float
    agreement: float
    difference: float


@torch.inference_mode()
def compare(
    reference: Predictor, others: Mapping[str, Predictor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Comparison]:
    """Each of `others` against the reference, in one pass over batches of normalized images, float32 [N, 3, S, S], and
    hard labels, int64 [N]."""
    images, largest = 0, torch.zeros(())
    right, same = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
    difference = dict.fromkeys(others, torch.zeros(()))  # torch's maximum keeps a nan
    for pixels, labels in batches:
        expected = reference(pixels)
        images, largest = images + len(labels), torch.maximum(largest, expected.abs().max())
        for name, predictor in others.items():
            found = predictor(pixels)
            predicted = found.argmax(dim=1)
            right[name] += int((predicted == labels).sum())
            same[name] += int((predicted == expected.argmax(dim=1)).sum())
            difference[name] = torch.maximum(difference[name], (found - expected).abs().max())
    return {
        name: Comparison(100 * right[name] / images, 100 * same[name] / images, float(difference[name] / largest))
        for name in others
    }
