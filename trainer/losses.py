"""Distillation losses on decoded top-k soft labels, each computed together with its gradient.

The divergence is KL(teacher || student), both at the same temperature T; the student's gradient is that of the soft
cross-entropy, and the teacher's entropy makes the value zero at agreement. `distillation_loss` multiplies it by T^2,
which keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531). Three tail policies say what the
C - k classes without a stored probability contribute:

    drop    nothing: the top k are renormalized (FKD, arXiv 2112.01528, calls this marginal re-norm)
    lump    one class more, the tail as a whole: the divergence of two distributions over k + 1 outcomes
    spread  the tail mass on the C - k classes: along the image's tail template where the labels have one, otherwise in
            equal parts (marginal smoothing in FKD; TinyViT, arXiv 2207.10666)

The gradient with respect to the logits is the student's distribution minus the labels' one, so it is known as soon as
the value is: one [B, C] buffer starts as the student's distribution, and the labels' k entries are subtracted from it.
A dense distribution of the teacher exists only where the tail lies along a template.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softshard.pipeline.store.topk import SoftLabels

TailPolicy = Literal["drop", "lump", "spread"]
Weighted = tuple[float, SoftLabels]  # the weight of a store's labels among several, and the labels


class Losses(NamedTuple):
    """Scalars: `total` carries the gradient; `hard`, the cross-entropy, and `soft`, T^2 times the divergence, do not,
    and are 0 where they play no part."""

    total: Tensor
    hard: Tensor
    soft: Tensor


def topk_kl(logits: Tensor, soft: SoftLabels, temperature: float, tail: TailPolicy) -> Tensor:
    """Mean over the batch of KL(teacher || student) at the temperature, in nats, without the factor T^2.

    logits: the student's, float [B, C], not yet divided by the temperature; `soft` is decoded at the same
    temperature, without gradient. Computed in float32 (float64 for float64 logits) even inside autocast. With k = C
    lump and spread are the dense KL divergence, and so is drop.
    """
    return _Known.apply(logits, *_divergence(_precise(logits), soft, temperature, tail))  # pyright: ignore


def distillation_loss(
    logits: Tensor,
    hard: Tensor | None,
    soft: Sequence[Weighted],
    *,
    alpha: float,
    temperature: float,
    tail: TailPolicy,
    label_smoothing: float,
) -> Losses:
    """(1 - alpha) * cross-entropy on hard labels + alpha * T^2 * KL on soft labels.

    logits float [B, C]; hard int64 [B], or float [B, C] for mixed labels. Soft labels of several teachers contribute
    the mean of their divergences by weight: with `drop` and `spread` that has the gradient of the divergence from the
    mean of their distributions. Without soft labels the loss is the cross-entropy alone and alpha plays no part; with
    alpha = 1 hard labels are not looked at and may be None. Computed in float32 (float64 for float64 logits) even
    inside autocast.
    """
    alpha = alpha if soft else 0.0
    precise = _precise(logits)
    hard_value = soft_value = precise.new_zeros(())
    gradient = None
    if alpha < 1:
        hard_value, gradient = _cross_entropy(precise, hard, label_smoothing)
        gradient.mul_(1 - alpha)
    total_weight = sum(weight for weight, _ in soft)
    for weight, labels in soft:
        value, part = _divergence(precise, labels, temperature, tail)
        share = weight / total_weight * temperature**2
        soft_value = soft_value + share * value
        gradient = part.mul_(alpha * share) if gradient is None else gradient.add_(part, alpha=alpha * share)
    value = (1 - alpha) * hard_value + alpha * soft_value
    return Losses(_Known.apply(logits, value, gradient), hard_value, soft_value)  # pyright: ignore


def mixed_labels(labels: Tensor, others: Tensor, shares: Tensor, classes: int) -> Tensor:
    """Hard labels of mixed images, float32 [B, C]: `shares` of `labels` and the rest of `others`, [B] each (Mixup,
    arXiv 1710.09412; CutMix, arXiv 1905.04899)."""
    mixed = torch.zeros(len(labels), classes, device=labels.device)
    mixed.scatter_add_(1, labels[:, None], shares[:, None])
    return mixed.scatter_add_(1, others[:, None], 1 - shares[:, None])


class _Known(torch.autograd.Function):
    """A scalar whose gradient with respect to the logits was computed with it."""

    @staticmethod
    def forward(ctx, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(ctx.dtype), None, None


@torch.no_grad()
def _cross_entropy(logits: Tensor, hard: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy with label smoothing, and its gradient [B, C]."""
    assert hard is not None, "hard labels may be left out only where soft labels are all of the loss"
    log_q = torch.log_softmax(logits, dim=1)
    gradient = log_q.exp()
    if hard.is_floating_point():
        target = hard.to(log_q.dtype) * (1 - smoothing) + smoothing / log_q.shape[1]
        value = -(target * log_q).sum(dim=1)
        gradient -= target
    else:
        index = hard[:, None]
        value = (smoothing - 1) * log_q.gather(1, index).squeeze(1) - smoothing * log_q.mean(dim=1)
        gradient -= smoothing / log_q.shape[1]
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1))
    return value.mean(), gradient.div_(len(logits))


@torch.no_grad()
def _divergence(logits: Tensor, soft: SoftLabels, temperature: float, tail: TailPolicy) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) at the temperature, and its gradient [B, C]."""
    log_q = torch.log_softmax(logits / temperature, dim=1)
    gradient = log_q.exp()
    top = log_q.gather(1, soft.index)
    probability = soft.probability.to(log_q.dtype)
    if tail == "drop":
        probability = probability / probability.sum(dim=1, keepdim=True)
    value, subtracted = _kl(probability, top), probability
    if tail != "drop" and soft.index.shape[1] < logits.shape[1]:  # else there is no tail, nor log(0 classes)
        mass = soft.tail.to(log_q.dtype)[:, None]
        if tail == "lump":
            # the student's tail from the classes themselves: log(1 - sum(top k)) is all rounding error when small
            others = log_q.scatter(1, soft.index, -torch.inf)
            value = value + _kl(mass, others.logsumexp(dim=1, keepdim=True))
            gradient.addcmul_(others.softmax(dim=1), mass, value=-1)
        elif soft.tail_distribution is not None:
            share = soft.tail_distribution.to(log_q.dtype)
            value = value + (torch.xlogy(mass, mass) + mass * _kl(share, log_q)[:, None]).squeeze(1)
            gradient.addcmul_(share, mass, value=-1)
        else:
            # the sum over the tail is that over all classes minus that over the top k
            each = mass / (log_q.shape[1] - top.shape[1])
            rest = log_q.sum(dim=1, keepdim=True) - top.sum(dim=1, keepdim=True)
            value = value + (torch.xlogy(mass, each) - each * rest).squeeze(1)
            gradient -= each
            subtracted = probability - each
    gradient.scatter_add_(1, soft.index, -subtracted)
    return value.mean(), gradient.div_(len(logits) * temperature)


def _precise(logits: Tensor) -> Tensor:
    """What sums are computed in, autocast or not: log_softmax and exp of float32 stay float32 in it."""
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))


def _kl(p: Tensor, log_q: Tensor) -> Tensor:
    # xlogy: a probability that underflowed to zero contributes exactly zero
    return (torch.xlogy(p, p) - p * log_q).sum(dim=1)
