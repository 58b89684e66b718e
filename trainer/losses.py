"""Distillation losses on decoded top-k soft labels.

The divergence is KL(teacher || student), both at the same temperature T; the student's gradient is that of the soft
cross-entropy, and the teacher's entropy makes the value zero at agreement. `distillation_loss` multiplies it by T^2,
which keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531). Three tail policies say what the
C - k classes without a stored probability contribute:

    drop    nothing: the top k are renormalized (FKD, arXiv 2112.01528, calls this marginal re-norm)
    lump    one class more, the tail as a whole: the divergence of two distributions over k + 1 outcomes
    spread  the tail mass on the C - k classes: along the image's tail template where the labels have one, otherwise in
            equal parts (marginal smoothing in FKD; TinyViT, arXiv 2207.10666)

A dense distribution of the teacher exists only where the tail lies along a template. The backward pass keeps the
student's log-probabilities, once for the hard labels and once for each store, and, with `lump`, those of the tail.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softshard.pipeline.store.topk import SoftLabels

TailPolicy = Literal["drop", "lump", "spread"]
Weighted = tuple[float, SoftLabels]  # the weight of a store's labels among several, and the labels


class Losses(NamedTuple):
    """Scalars: `total` carries the gradient, the others do not and are 0 where they play no part.

    `hard` is the cross-entropy, `soft` T^2 times the divergence.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor


def topk_kl(logits: Tensor, soft: SoftLabels, temperature: float, tail: TailPolicy) -> Tensor:
    """Mean over the batch of KL(teacher || student) at the temperature, without the factor T^2.

    With k = C lump and spread are the dense KL divergence, and so is drop.

    Args:
        logits: The student's, float [B, C], not yet divided by the temperature.
        soft: Labels decoded at the same temperature, without gradient.
        temperature: Of both distributions.
        tail: What the classes without a stored probability contribute.

    Returns:
        A scalar in nats, computed in float32 (float64 for float64 logits) even inside autocast.

    Raises:
        ValueError: The tail policy is unknown.
    """
    return _divergence(_precise(logits), soft, temperature, tail)


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

    Soft labels of several teachers contribute the mean of their divergences by weight: with `drop` and `spread` that
    has the gradient of the divergence from the mean of their distributions.

    Args:
        logits: The student's, float [B, C].
        hard: int64 [B], or float [B, C] for mixed labels. With alpha = 1 they are not read and may be None.
        soft: Labels of each teacher with their weights. Without any the loss is the cross-entropy, whatever alpha is.
        alpha: The weight of the soft labels against the hard ones, 0 to 1.
        temperature: That at which the soft labels were decoded.
        tail: What the classes without a stored probability contribute.
        label_smoothing: Of the hard labels.

    Returns:
        Scalars in nats, computed in float32 (float64 for float64 logits) even inside autocast.

    Raises:
        ValueError: The tail policy is unknown.
    """
    alpha = alpha if soft else 0.0
    precise = _precise(logits)
    hard_value = soft_value = precise.new_zeros(())
    if alpha < 1:
        assert hard is not None, "hard labels may be left out only where soft labels are all of the loss"
        target = hard.to(precise.dtype) if hard.is_floating_point() else hard
        hard_value = cross_entropy(precise, target, label_smoothing=label_smoothing)
    total_weight = sum(weight for weight, _ in soft)
    for weight, labels in soft:
        divergence = _divergence(precise, labels, temperature, tail)
        soft_value = soft_value + weight / total_weight * temperature**2 * divergence
    total = (1 - alpha) * hard_value + alpha * soft_value
    return Losses(total, hard_value.detach(), soft_value.detach())


def mixed_labels(labels: Tensor, others: Tensor, lam: Tensor, classes: int) -> Tensor:
    """Hard labels of mixed images (Mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899).

    Args:
        labels: int64 [B].
        others: int64 [B], the labels of the images mixed in.
        lam: float32 [B], the weights of `labels`; `others` have the rest of 1.
        classes: How many there are, C.

    Returns:
        float32 [B, C].
    """
    mixed = torch.zeros(len(labels), classes, device=labels.device)
    mixed.scatter_add_(1, labels[:, None], lam[:, None])
    return mixed.scatter_add_(1, others[:, None], 1 - lam[:, None])


def _divergence(logits: Tensor, soft: SoftLabels, temperature: float, tail: TailPolicy) -> Tensor:
    if tail not in get_args(TailPolicy):
        raise ValueError(f"tail: expected one of {', '.join(get_args(TailPolicy))}, found {tail!r}; correct it")
    log_q = torch.log_softmax(logits / temperature, dim=1)
    probability = soft.probability.to(log_q.dtype)
    if tail == "drop":
        probability = probability / probability.sum(dim=1, keepdim=True)
    value = _kl(probability, log_q.gather(1, soft.index))
    if tail != "drop" and soft.index.shape[1] < logits.shape[1]:  # else there is no tail, nor log(0 classes)
        value = value + _tail_kl(log_q, soft, tail)
    return value.mean()


def _tail_kl(log_q: Tensor, soft: SoftLabels, tail: TailPolicy) -> Tensor:
    """What the tail contributes to the divergence of each row, [B]."""
    mass = soft.tail.to(log_q.dtype)
    if tail == "lump":
        # the student's tail from the classes themselves: log(1 - sum(top k)) is all rounding error when small
        others = log_q.scatter(1, soft.index, -torch.inf).logsumexp(dim=1, keepdim=True)
        return _kl(mass[:, None], others)
    if soft.tail_distribution is not None:
        return torch.xlogy(mass, mass) + mass * _kl(soft.tail_distribution.to(log_q.dtype), log_q)
    # the sum over the tail is that over all classes minus that over the top k
    each = mass / (log_q.shape[1] - soft.index.shape[1])
    rest = log_q.sum(dim=1) - log_q.gather(1, soft.index).sum(dim=1)
    return torch.xlogy(mass, each) - each * rest


def _precise(logits: Tensor) -> Tensor:
    """What sums are computed in, autocast or not: log_softmax and exp of float32 stay float32 in it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kl(p: Tensor, log_q: Tensor) -> Tensor:
    # xlogy: a probability that underflowed to zero contributes exactly zero
    return (torch.xlogy(p, p) - p * log_q).sum(dim=1)
