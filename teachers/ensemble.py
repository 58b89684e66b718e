"""Several teachers, and mirrored views, averaged into one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from softshard.teachers.teacher import Teacher, TeacherError


class Ensemble(nn.Module):
    """The weighted mean of frozen teachers, as Hinton et al. distil an ensemble (arXiv 1503.02531, section 2): their
    arithmetic mean ("probabilities"), or the mean of their logits, which is the geometric one ("logits").

    With `flip` each teacher also sees the mirrored view, and its share is halved between the two. Only the weights'
    ratios matter. `sizes` are the distinct input sizes, ascending.

    forward: {size: uint8 [B, 3, size, size]} for each of `sizes` -> float32 [B, classes]: mean logits, or the log of
    the mean probabilities. One teacher without flip gives its own logits, bit for bit. What is not finite in the logits
    of one teacher is not finite in the result.

    Raises TeacherError: no teachers, class counts that differ, a weight for each that is not finite and positive.
    """

    weights: Tensor

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        mean: Literal["probabilities", "logits"],
        flip: bool,
    ) -> None:
        super().__init__()
        _check(teachers, weights)
        self.teachers = nn.ModuleList(teachers)
        self.mean, self.flip = mean, flip
        self.sizes = tuple(sorted({teacher.size for teacher in teachers}))
        self._inputs = tuple(teacher.size for teacher in teachers)
        views = 2 if flip else 1
        fractions = [weight / math.fsum(weights) / views for weight in weights for _ in range(views)]
        self.register_buffer("weights", torch.tensor(fractions).view(-1, 1, 1))

    def forward(self, images: Mapping[int, Tensor]) -> Tensor:
        logits = torch.stack(list(self._logits(images)))  # [teachers x views, B, classes]
        if len(logits) == 1:
            return logits[0]
        # no matrix product, which autocast would round to half precision
        if self.mean == "logits":
            return (self.weights * logits).sum(0)
        # a logit of minus infinity would be a probability of zero, and pass unseen
        log_probabilities = logits.log_softmax(-1).where(logits.isfinite(), torch.nan)
        return (log_probabilities + self.weights.log()).logsumexp(0)

    def _logits(self, images: Mapping[int, Tensor]) -> Iterator[Tensor]:
        for teacher, size in zip(self.teachers, self._inputs, strict=True):
            yield teacher(images[size])
            if self.flip:
                yield teacher(images[size].flip(-1))


def _check(teachers: Sequence[Teacher], weights: Sequence[float]) -> None:
    if not teachers:
        raise TeacherError("ensemble: expected at least one teacher, found none; name one")
    if len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights):
        raise TeacherError(
            f"ensemble: expected {len(teachers)} finite weights above 0, found {list(weights)}; give each teacher one"
        )
    if len({teacher.classes for teacher in teachers}) > 1:
        found = ", ".join(f"{teacher.name} {teacher.classes}" for teacher in teachers)
        raise TeacherError(f"ensemble: expected one class count, found {found}; use teachers of one class list")
