"""All branches of a pointwise convolution through one convolution, with exact batch statistics.

A branch gives z = w x at every pixel, so its mean is w m and its variance diag(w S w'), where m and S are the mean and
the covariance of the C input channels: one C x C matrix serves all branches, and the identity, whose kernel is the
unit matrix. The rest is the algebra of depthwise.py with channels in the place of taps: the sum of the normalized
branches is one convolution with K = sum a w, and backward, with D = sum of dy (x - m)',

    d gamma = g = diag(w D') / sqrt(variance + eps)
    d w     = a (D - g / sqrt(variance + eps) w S)
    d x     = K' (dy - mean dy) - Q (x - m),  Q = sum w' a g / (sqrt(variance + eps) M) w

Only x is kept for it: two products of x with C x C matrices more than the plain convolution, and no pass over the
outputs for batch norms. Plain torch, for any device.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from softshard.trainer.students.fused.conv_geometry import Limits
from softshard.trainer.students.fused.depthwise import average_over_ranks, sum_over, total_of


class PointwiseBranches(torch.autograd.Function):
    """(x, weight, gamma, beta, limits, eps, group) -> (y, mean, variance).

    x [N, C, H, W], of any float dtype; weight [R, O, C] and gamma [R, O] of R branches and beta [O], the sum of theirs,
    float32 (float64 where x is). y [N, O, H, W], channels last, of the autocast dtype under autocast and otherwise that
    of x; mean and (unbiased) variance [R, O] are for the running statistics alone. Statistics are computed in the dtype
    of weight. y is clamped to `limits`, if given (ReLU, ReLU6), and is then kept for the backward pass. With a process
    group, statistics are those of all its processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        limits: Limits | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        dtype = dtype_of_result(x)
        with torch.autocast(x.device.type, enabled=False):
            rows, count = rows_of(x).to(weight.dtype), total_of(group, len(x) * x.shape[2] * x.shape[3], x.device)
            mean_of_x = rows.sum(0)
            sum_over(group, mean_of_x)
            mean_of_x /= count
            centered = rows - mean_of_x  # first: products of large means would leave nothing of small variances
            covariance = (centered.t() @ centered).div_(count)
            sum_over(group, covariance)
            product = weight @ covariance
            variance = (product * weight).sum(2).clamp_(min=0)
            deviation = (variance + eps).rsqrt_()
            factor = gamma * deviation
            kernel = (weight * factor[:, :, None]).sum(0)
            y = _convolution(x, kernel, beta - kernel @ mean_of_x, dtype)
            if limits:
                y.clamp_(*limits)
            mean, unbiased = weight @ mean_of_x, variance * (count / (count - 1))
        ctx.save_for_backward(x, y if limits else None, weight, product, mean_of_x, deviation, factor, kernel)
        ctx.count, ctx.group, ctx.limits = count, group, limits
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x, weight, gamma and beta, by the formulas at the head of this file."""
        x, y, weight, product, mean_of_x, deviation, factor, kernel = ctx.saved_tensors
        # First, though rows_of would copy what lies otherwise: of layouts that differ torch.compile expects other
        # strides of hardtanh_backward than it has.
        dy = _through(dy.contiguous(memory_format=torch.channels_last), y, ctx.limits)
        with torch.autocast(x.device.type, enabled=False):
            rows, centered = rows_of(dy), (rows_of(x).to(weight.dtype) - mean_of_x).to(dy.dtype)
            correlation, total = (rows.t() @ centered).to(weight.dtype), rows.sum(0, dtype=weight.dtype)
            processes = sum_over(ctx.group, correlation, total)
            gamma_gradient = (weight * correlation).sum(2) * deviation
            q_factor = factor * gamma_gradient * deviation
            weight_gradient = (factor[:, :, None] * correlation).addcmul_(q_factor[:, :, None], product, value=-1)
            quadratic = weight.flatten(0, 1).t() @ (weight * (q_factor / ctx.count)[:, :, None]).flatten(0, 1)
            constant = (total / -ctx.count) @ kernel
            dx = torch.addmm(constant.to(dy.dtype), rows, kernel.to(dy.dtype))
            dx.addmm_(centered, quadratic.to(dy.dtype), alpha=-1)
        gradients = average_over_ranks(processes, weight_gradient, gamma_gradient, total)
        return images_of(dx.to(x.dtype), x), *gradients, None, None, None


def dtype_of_result(x: Tensor) -> torch.dtype:
    """Return the dtype that an ordinary convolution of x would give: under autocast, autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _through(dy: Tensor, y: Tensor, limits: Limits | None) -> Tensor:
    """The gradient before an activation, from the one after it."""
    return torch.ops.aten.hardtanh_backward(dy, y, *limits) if limits else dy


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The 1 x 1 convolution of x [N, C, H, W] with kernel [O, C] and bias [O]; channels last."""
    x = x.to(dtype, memory_format=torch.channels_last)
    return F.conv2d(x, kernel.to(dtype)[:, :, None, None], bias.to(dtype))


def rows_of(images: Tensor) -> Tensor:
    """View images [N, C, H, W] as rows [N H W, C]; no copy when channels are last."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """View rows [N H W, C] as images [N, C, H, W], channels last, of the size of `like`."""
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)
