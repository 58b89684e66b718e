"""Soft labels as a few bytes: the classes a teacher finds most probable, their log-probability gaps, the tail mass.

A teacher's output for one view is kept without a temperature: the k most probable classes in descending order
(index), the differences between neighboring log-probabilities in steps of 1/16 nat (gap), and the mass of all other
classes relative to the first one (tail). The first probability needs no storage, because everything sums to one.
`decode` gives the distribution at any temperature. How the tail mass lies on its classes is not kept for each view; a
tail template, one for each image, says it for all of its views: the mean log-probability of every class over a few of
them, in steps of 1/2 nat.

Sources: storing the top k of a teacher once for all epochs is FKD (arXiv 2112.01528) and TinyViT (arXiv 2207.10666);
the temperature is Hinton et al. (arXiv 1503.02531). The byte layout is described in FORMAT.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.pipeline.runtime.errors import DataError

STEPS_PER_NAT = 16  # gap and tail count sixteenths of a nat: a stored log-probability ratio is off by 1/32 at most
TAIL_OFFSET = 176  # tail codes reach from -11 to +4.9 nat around the first class's log-probability
TEMPLATE_STEPS_PER_NAT = 2
CODE_MAX = 255
UINT16_CLASSES = 65534  # uint16 indices need one value that is no class, for the fill value of a store


@dataclass(frozen=True, eq=False)
class Codes:
    """Encoded soft labels of any number of rows; k is the last axis of `index`.

    index: uint16 [..., k] (uint32 above 65534 classes), most probable first
    gap:   uint8 [..., k - 1], steps of 1/16 nat between neighbors, saturating at 255
    tail:  uint8 [...], round(16 * (log tail mass - lp_1)) + 176, saturating; 0 when k is the number of classes
    """

    index: NDArray[Any]
    gap: NDArray[np.uint8]
    tail: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, rows: slice | NDArray[Any]) -> "Codes":
        """The codes of some rows, in the order asked for."""
        if isinstance(rows, slice):
            return Codes(self.index[rows], self.gap[rows], self.tail[rows])
        # take: a third of the time of indexing
        return Codes(*(np.take(array, rows, axis=0) for array in (self.index, self.gap, self.tail)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """index as int64, gap and tail, as `decode` takes them."""
        return torch.from_numpy(self.index.astype(np.int64)), torch.from_numpy(self.gap), torch.from_numpy(self.tail)

    def top(self, k: int, classes: int) -> "Codes":
        """The codes of the k most probable classes alone, of `classes`: the mass of the others goes to the tail, which
        is rounded once more."""
        kept = self.index.shape[-1]
        assert 1 <= k <= kept, f"k = {k} of {kept}"
        if k == kept:
            return self
        ratio = np.cumsum(self.gap, axis=-1, dtype=np.int64)[..., k - 1 :] / -STEPS_PER_NAT
        mass = np.exp(ratio).sum(axis=-1)
        if kept < classes:
            mass += np.exp((self.tail.astype(np.float64) - TAIL_OFFSET) / STEPS_PER_NAT)
        with np.errstate(divide="ignore"):  # all of them underflowed
            tail = np.round(STEPS_PER_NAT * np.log(mass)) + TAIL_OFFSET
        return Codes(self.index[..., :k], self.gap[..., : k - 1], tail.clip(0, CODE_MAX).astype(np.uint8))

    @staticmethod
    def concatenate(parts: Sequence["Codes"]) -> "Codes":
        """All rows of `parts`, one part after the other."""
        return Codes(
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.gap for part in parts]),
            np.concatenate([part.tail for part in parts]),
        )


class Encoded(NamedTuple):
    """Codes while they are still on the teacher's device, where nothing waits for them: index int64 [B, k], gap uint8
    [B, k - 1], tail uint8 [B], and bool [B] `valid`: whether the row's logits were a distribution."""

    index: Tensor
    gap: Tensor
    tail: Tensor
    valid: Tensor


class SoftLabels(NamedTuple):
    """Soft labels at one temperature; `probability` and `tail` of a row sum to one.

    index:       int64 [B, k], classes
    probability: float32 [B, k]
    tail:        float32 [B], mass of the other C - k classes together; exactly 0 when k = C
    tail_distribution: float32 [B, C], how the tail mass lies on the classes (0 for the top k); None: on all C - k
        alike
    """

    index: Tensor
    probability: Tensor
    tail: Tensor
    tail_distribution: Tensor | None = None


def index_dtype(classes: int) -> np.dtype[Any]:
    """The dtype of class indices among `classes` classes; its largest value is never a class."""
    return np.dtype(np.uint16 if classes <= UINT16_CLASSES else np.uint32)


def encode(logits: Tensor, k: int) -> Codes:
    """Encode the k most probable classes of each row and the mass of the rest.

    logits: float [B, C], 1 <= k <= C, on any device; halves are computed in float32, doubles stay doubles. Equal
    logits are ranked by class, lower first, so the codes are a function of the logits. A logit of -inf is a class
    that cannot be. Raises DataError for rows that are no distribution (NaN, +inf, nothing but -inf).
    """
    encoded = encode_on_device(logits, k)
    bad = len(logits) - int(encoded.valid.sum())
    if bad:
        raise DataError(
            f"teacher logits: expected finite numbers, found NaN or infinity in {bad} of {len(logits)} rows; "
            "check the teacher's weights, or run it in float32"
        )
    return to_codes(encoded, logits.shape[1])


def encode_on_device(logits: Tensor, k: int) -> Encoded:
    """As `encode`, but the codes stay on the device, and rows that are no distribution are marked."""
    assert logits.ndim == 2, f"logits are [B, C], not {tuple(logits.shape)}"
    assert 1 <= k <= logits.shape[1], f"k = {k} of {logits.shape[1]} classes"
    ranked, index = torch.sort(_precise(logits), dim=1, descending=True, stable=True)
    log_p = torch.log_softmax(ranked, dim=1)
    return Encoded(index[:, :k], _gap_codes(log_p[:, :k]), _tail_codes(log_p, k), ~log_p[:, 0].isnan())


def to_codes(encoded: Encoded, classes: int) -> Codes:
    """The codes in memory, with indices of the dtype that a store of `classes` classes has."""
    index = encoded.index.to(torch.int32).cpu().numpy().astype(index_dtype(classes))
    return Codes(index, encoded.gap.cpu().numpy(), encoded.tail.cpu().numpy())


def encode_template(logits: Tensor) -> Tensor:
    """The tail template of each image: uint8 [B, C] from the logits of some of its views, float [B, T, C].

    round(2 * (max - mean)) with the mean log-probability of each class over the views, saturating at 255: steps of
    1/2 nat below the most probable class. Raises nothing: rows that are no distribution are for `encode` to report.
    """
    mean = torch.log_softmax(_precise(logits), dim=2).mean(dim=1)
    steps = torch.round(TEMPLATE_STEPS_PER_NAT * (mean.amax(dim=1, keepdim=True) - mean))
    return steps.nan_to_num(nan=CODE_MAX).clamp(0, CODE_MAX).to(torch.uint8)


def decode(
    index: Tensor, gap: Tensor, tail: Tensor, classes: int, temperature: float, template: Tensor | None = None
) -> SoftLabels:
    """Soft labels of encoded rows at a temperature, on the tensors' own device.

    index [B, k] of any integer dtype, gap uint8 [B, k - 1], tail uint8 [B]; `classes` is C; template uint8 [B, C] of
    the rows' images. How the tail's mass lies on its classes decides how it grows with the temperature: along the
    template, or on all C - k classes alike without one. Indices are taken as they are: a store checks their range when
    it reads them.
    """
    index, k = index.long(), index.shape[1]
    # differences were taken after rounding, so the sums are exact multiples of 1/16 and errors do not add up
    steps = torch.nn.functional.pad(torch.cumsum(gap, dim=1), (1, 0))
    ratio = steps.to(torch.float32) / (-STEPS_PER_NAT * temperature)
    if k == classes:
        return SoftLabels(index, torch.softmax(ratio, dim=1), ratio.new_zeros(len(ratio)))
    log_mass = (tail.to(torch.float32) - TAIL_OFFSET) / STEPS_PER_NAT
    share = None
    if template is None:
        log_others = math.log(classes - k)
        tail_ratio = log_others + (log_mass - log_others) / temperature
    else:
        shape = (template.to(torch.float32) / -TEMPLATE_STEPS_PER_NAT).scatter_(1, index, -torch.inf)
        cooled = shape / temperature
        log_others = torch.logsumexp(cooled, dim=1)
        share = torch.exp(cooled - log_others[:, None])
        tail_ratio = log_others + (log_mass - torch.logsumexp(shape, dim=1)) / temperature
    probability = torch.softmax(torch.cat([ratio, tail_ratio[:, None]], dim=1), dim=1)
    return SoftLabels(index, probability[:, :k], probability[:, k], share)


def decode_on(
    device: torch.device,
    codes: Codes,
    classes: int,
    temperature: float,
    template: NDArray[np.uint8] | None = None,
) -> SoftLabels:
    """As `decode`, of codes in memory, on a device: only codes are copied there, and nothing waits for it."""
    parts = [*codes.tensors()]
    if template is not None:
        parts.append(torch.from_numpy(template))
    if device.type == "cuda":
        parts = [part.pin_memory() for part in parts]  # else the copy is not one that nobody waits for
    index, gap, tail, *shape = (part.to(device, non_blocking=True) for part in parts)
    return decode(index, gap, tail, classes, temperature, *shape)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gap_codes(log_p: Tensor) -> Tensor:
    steps = torch.round(STEPS_PER_NAT * (log_p[:, :1] - log_p))
    # two impossible classes are infinitely far down and no step apart
    return torch.diff(steps, dim=1).nan_to_num(nan=0.0).clamp(max=CODE_MAX).to(torch.uint8)


def _tail_codes(log_p: Tensor, k: int) -> Tensor:
    # summed over the classes themselves: 1 - sum(top k) would be all rounding error for a confident teacher
    ratio = torch.logsumexp(log_p[:, k:], dim=1) - log_p[:, 0]
    return (torch.round(STEPS_PER_NAT * ratio) + TAIL_OFFSET).clamp(0, CODE_MAX).to(torch.uint8)
