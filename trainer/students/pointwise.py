"""All branches of a pointwise convolution through one convolution, with exact batch statistics.

A branch gives z = w x at every pixel, so its mean is w m and its variance diag(w S w'), where m and S are the mean and
the covariance of the C input channels: one C x C matrix serves all branches, and the identity, whose kernel is the
unit matrix. The rest is the algebra of depthwise.py with channels in the place of taps: the sum of the normalised
branches is one convolution with K = sum a w, and backward, with D = sum of dy (x - m)',

    d gamma = g = diag(w D') / sqrt(variance + eps)
    d w     = a (D - g / sqrt(variance + eps) w S)
    d x     = K' (dy - mean dy) - Q (x - m),  Q = sum w' a g / (sqrt(variance + eps) M) w

Only x is kept for it. Plain torch, for any device: two products of x with C x C matrices more than the plain
convolution, and no pass over the outputs for batch norms.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.students.depthwise import sum_over, total_of


class PointwiseBranches(torch.autograd.Function):
    """(x, weight, gamma, beta, eps, group) -> (y, mean, variance).

    x [N, C, H, W], of any float dtype; weight [R, O, C] and gamma [R, O] of R branches and beta [O], the sum of theirs,
    float32 (float64 where x is). y [N, O, H, W], channels last, of the autocast dtype under autocast and otherwise that
    of x; mean and (unbiased) variance [R, O] are for the running statistics alone. Statistics are computed in the dtype
    of weight. With a process group they are those of all its processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows, count = _rows(x).to(weight.dtype), total_of(group, len(x) * x.shape[2] * x.shape[3], x.device)
            mean_of_x = rows.sum(0)
            sum_over(group, mean_of_x)
            mean_of_x /= count
            centred = rows - mean_of_x  # first: products of large means would leave nothing of small variances
            covariance = (centred.t() @ centred).div_(count)
            sum_over(group, covariance)
            product = weight @ covariance
            variance = (product * weight).sum(2).clamp_(min=0)
            deviation = (variance + eps).rsqrt_()
            factor = gamma * deviation
            kernel = (weight * factor[:, :, None]).sum(0)
            size = (len(x), weight.shape[1], *x.shape[2:])
            y = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)
            # Into y, so that y is no view: an activation in place may follow.
            torch.addmm(beta.to(dtype), centred.to(dtype), kernel.to(dtype).t(), out=_rows(y))
        ctx.save_for_backward(x, weight, product, mean_of_x, deviation, factor, kernel)
        ctx.count, ctx.group = count, group
        mean, unbiased = weight @ mean_of_x, variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, product, mean_of_x, deviation, factor, kernel = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            rows, centred = _rows(dy), (_rows(x).to(weight.dtype) - mean_of_x).to(dy.dtype)
            correlation, total = (rows.t() @ centred).to(weight.dtype), rows.sum(0, dtype=weight.dtype)
            processes = sum_over(ctx.group, correlation, total)
            gamma_gradient = (weight * correlation).sum(2) * deviation
            inner = correlation - (gamma_gradient * deviation)[:, :, None] * product
            weight_gradient = factor[:, :, None] * inner
            share = (factor * gamma_gradient * deviation / ctx.count).view(-1, 1)
            quadratic = weight.flatten(0, 1).t() @ (weight.flatten(0, 1) * share)
            constant = (total / -ctx.count) @ kernel
            dx = torch.addmm(constant.to(dy.dtype), rows, kernel.to(dy.dtype))
            dx.addmm_(centred, quadratic.to(dy.dtype), alpha=-1)
        gradients = [gradient / processes for gradient in (weight_gradient, gamma_gradient, total)]
        dx = dx.to(x.dtype).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return dx, *gradients, None, None


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, C]; no copy when channels are last."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)
