"""Distillation losses on decoded top-k soft labels.

The divergence is KL(teacher || student), both at the same temperature T; the student's gradient is that of the soft
cross-entropy, and the teacher's entropy makes the value zero at agreement. `distillation_loss` multiplies it by T^2,
which keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531). Three tail policies say what the
C - k classes without a stored probability contribute:

    drop    nothing: the top k are renormalised (FKD, arXiv 2112.01528, calls this marginal re-norm)
    lump    one class more, the tail as a whole: the divergence of two distributions over k + 1 outcomes
    spread  the tail mass on the C - k classes: along the image's tail template where the labels have one, otherwise in
            equal parts (marginal smoothing in FKD; TinyViT, arXiv 2207.10666)
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.topk import SoftLabels

TailPolicy = Literal["drop", "lump", "spread"]


def topk_kl(logits: Tensor, soft: SoftLabels, temperature: float, tail: TailPolicy) -> Tensor:
    """Mean over the batch of KL(teacher || student) at the temperature, in nats, without the factor T^2.

    logits: the student's, float [B, C], not yet divided by the temperature; `soft` is decoded at the same
    temperature, without gradient. Computed in float32 (float64 for float64 logits) even inside autocast. With k = C
    lump and spread are the dense KL divergence, and so is drop.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_q = functional.log_softmax(_precise(logits) / temperature, dim=1)
        top = log_q.gather(1, soft.index)
        if tail == "drop":
            return _kl(soft.probability / soft.probability.sum(dim=1, keepdim=True), top).mean()
        divergence = _kl(soft.probability, top)
        if soft.index.shape[1] < logits.shape[1]:  # else there is no tail, and log(0 classes) must not be formed
            divergence = divergence + (_lumped if tail == "lump" else _spread)(log_q, top, soft)
        return divergence.mean()


def distillation_loss(
    logits: Tensor,
    hard: Tensor | None,
    soft: SoftLabels | None,
    *,
    alpha: float,
    temperature: float,
    tail: TailPolicy,
    label_smoothing: float,
) -> Tensor:
    """(1 - alpha) * cross-entropy on hard labels + alpha * T^2 * KL on soft labels; a scalar.

    logits float [B, C]; hard int64 [B], or float [B, C] for mixed labels. Without soft labels it is the cross-entropy
    alone and alpha plays no part; with alpha = 1 hard labels are not looked at and may be None.
    """
    if soft is None:
        return _cross_entropy(logits, hard, label_smoothing)
    divergence = temperature**2 * topk_kl(logits, soft, temperature, tail)
    if alpha == 1:
        return divergence
    return (1 - alpha) * _cross_entropy(logits, hard, label_smoothing) + alpha * divergence


def mixed_labels(labels: Tensor, others: Tensor, shares: Tensor, classes: int) -> Tensor:
    """Hard labels of mixed images, float32 [B, C]: `shares` of `labels` and the rest of `others`, [B] each (Mixup,
    arXiv 1710.09412; CutMix, arXiv 1905.04899)."""
    mixed = torch.zeros(len(labels), classes, device=labels.device)
    mixed.scatter_add_(1, labels[:, None], shares[:, None])
    return mixed.scatter_add_(1, others[:, None], 1 - shares[:, None])


def _cross_entropy(logits: Tensor, hard: Tensor | None, label_smoothing: float) -> Tensor:
    assert hard is not None, "hard labels may be left out only where soft labels are all of the loss"
    with torch.autocast(logits.device.type, enabled=False):
        logits = _precise(logits)
        hard = hard.to(logits.dtype) if hard.is_floating_point() else hard
        return functional.cross_entropy(logits, hard, label_smoothing=label_smoothing)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kl(p: Tensor, log_q: Tensor) -> Tensor:
    # xlogy: a probability that underflowed to zero contributes exactly zero, with a finite gradient
    return (torch.xlogy(p, p) - p * log_q).sum(dim=1)


def _lumped(log_q: Tensor, top: Tensor, soft: SoftLabels) -> Tensor:
    # the student's tail mass from the classes themselves: log(1 - sum(top k)) is all rounding error when it is small
    log_q_tail = log_q.scatter(1, soft.index, -torch.inf).logsumexp(dim=1, keepdim=True)
    return _kl(soft.tail[:, None], log_q_tail)


def _spread(log_q: Tensor, top: Tensor, soft: SoftLabels) -> Tensor:
    if soft.tail_share is not None:
        divergence = _kl(soft.tail_share, log_q)  # of the shares alone: each is still to be multiplied by the tail
        return torch.xlogy(soft.tail, soft.tail) + soft.tail * divergence
    # sum over the tail = sum over all - sum over the top k: a dense teacher distribution is never built
    each = soft.tail / (log_q.shape[1] - top.shape[1])
    return torch.xlogy(soft.tail, each) - each * (log_q.sum(dim=1) - top.sum(dim=1))
