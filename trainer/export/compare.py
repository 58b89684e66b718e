"""Predictors side by side: the formats of an export against the student that they were made from."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from softshard.trainer.export.formats.contract import Predictor


class Comparison(NamedTuple):
    """A predictor against a reference."""

    top1: float  # percent
    agreement: float  # percent of predictions that are the reference's
    difference: float  # the largest one from the reference's logits, relative to the largest of them


@torch.inference_mode()
def compare(
    reference: Predictor, others: Mapping[str, Predictor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Comparison]:
    """Compare predictors with a reference in one pass over images.

    Args:
        reference: what the others should compute.
        others: by their names.
        batches: normalized images, float32 [N, 3, S, S], and their hard labels, int64 [N].

    Returns:
        A comparison under each name.
    """
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
