"""How the branches of a layer train: as one convolution where that is cheaper, with the same statistics and gradients.

Forms, of which each layer's shape chooses one (the alternative, one convolution and batch norm for each branch, is what
MultiBranchConv does by itself). `implementation` auto takes one where it is cheaper, fused wherever there is one:

    depthwise   DepthwiseBranches: statistics from the Gram matrix of the patches; on a CPU
    triton      the same, and on a GPU as well, in Triton: only where `implementation` is fused or triton, for nobody
                has measured it there
    closed      PointwiseBranches: statistics from the covariance of the input, for 1 x 1 kernels; anywhere
    stacked     one product and one batch norm with the channels of all branches, then their sum, for 1 x 1 kernels
                whose input is so much wider than their output that its covariance costs more; anywhere

They know nothing but a branch's ordinary parameters and statistics, so checkpoints, EMA, evaluation and fold do not
depend on them.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softshard.trainer.students.fused.conv_geometry import ConvGeometry, Limits, center_tap, output_size, padding, two
from softshard.trainer.students.fused.depthwise import CHEAP_TAPS, MOST_TAPS, DepthwiseBranches, runs_here
from softshard.trainer.students.fused.pointwise import PointwiseBranches, dtype_of_result, images_of, rows_of

Form = Literal["depthwise", "triton", "closed", "stacked"]
Implementation = Literal["auto", "fused", "separate", "triton"]
Norm = nn.BatchNorm2d | nn.SyncBatchNorm  # a SyncBatchNorm is what a conversion leaves


class Branches(NamedTuple):
    """What the branches of a layer compute with."""

    conv: nn.Conv2d  # for its settings
    weights: tuple[Tensor, ...]  # of the k x k branches, [O, C / groups, k, k]
    bias: Tensor | None  # of the first, [O]
    scale: Tensor | None  # the weight of the 1 x 1 branch, [O, C / groups, 1, 1]
    identity: bool
    norms: Sequence[Norm]  # of all branches, in this order
    limits: Limits | None  # of the activation that follows


def form_of(conv: nn.Conv2d, branches: int, identity: bool, implementation: str = "auto") -> Form | None:
    """Choose the form in which `branches` copies of a convolution train; None: as separate branches.

    It is the cheapest one, or with `fused` the cheapest of those that are one convolution. With C inputs and O outputs,
    the products of a 1 x 1 layer in training cost 3 O C + 2 C C multiplications a pixel in the closed form, 3 R O C
    stacked.
    """
    if implementation == "separate" or why_not_fused(conv):
        return None
    if _is_pointwise(conv):
        closed = 2 * conv.in_channels < 3 * (branches - 1) * conv.out_channels
        return "closed" if closed or identity else "stacked" if branches > 1 else None
    if max(conv.kernel_size) > CHEAP_TAPS and implementation != "fused":
        return None
    return "triton" if implementation in ("fused", "triton") else "depthwise"


def why_not_fused(conv: nn.Conv2d) -> str:
    """Say why no one convolution computes all branches of a layer, after its name; empty where one does."""
    if _is_pointwise(conv):
        return ""
    if not conv.groups == conv.in_channels == conv.out_channels:
        return "is neither pointwise without padding nor depthwise with as many outputs as inputs"
    if conv.dilation != (1, 1):
        return "has a dilated kernel"
    return f"has a kernel of more than {MOST_TAPS} pixels" if max(conv.kernel_size) > MOST_TAPS else ""


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Padding would count in the statistics."""
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "same", "valid")


def form_of_batch(form: Form, conv: nn.Conv2d, x: Tensor, norms: Sequence[Norm], always: bool) -> Form | None:
    """Choose the form in which a batch trains; None: as separate branches, as where a batch norm is in evaluation mode.

    What torch refuses is left to its modules, which raise their errors: other channels, images smaller than the kernel,
    one value for each channel. Stacked branches with SyncBatchNorm are left to them, too, unless they are `always` to
    be one convolution: then they train in closed form.
    """
    if x.ndim != 4 or x.shape[1] != conv.in_channels or not all(norm.training for norm in norms):
        return None
    height, width = (output_size(conv, axis, x.shape[2 + axis]) for axis in (0, 1))
    if min(height, width) < 1 or len(x) * height * width < (2 if _group(norms) is None else 1):
        return None
    if form in ("depthwise", "triton"):
        here = runs_here() if x.device.type == "cpu" else form == "triton" and x.device.type == "cuda"
        return form if here else None
    if form == "stacked" and _group(norms) is not None:
        return "closed" if always else None
    return form


def sum_of_branches(form: Form, x: Tensor, branches: Branches) -> Tensor:
    """Sum all branches of x, as MultiBranchConv does in training; running statistics are updated as well."""
    return _pointwise(x, branches, form) if form in ("closed", "stacked") else _depthwise(x, branches)


@torch.compiler.disable()  # the kernels are no operations that torch could compile
def _depthwise(x: Tensor, branches: Branches) -> Tensor:
    conv = branches.conv
    before = tuple(padding(conv, axis, x.shape[2 + axis])[0] for axis in (0, 1))
    output = tuple(output_size(conv, axis, x.shape[2 + axis]) for axis in (0, 1))
    geometry = ConvGeometry(two(conv.kernel_size), two(conv.stride), two(before), two(output))
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y, mean, variance = DepthwiseBranches.apply(  # pyright: ignore[reportGeneralTypeIssues]
        exact, *_arrays(branches, True), geometry, branches.limits, branches.norms[0].eps, _group(branches.norms)
    )
    _update(branches, mean, variance)
    return y.to(dtype_of_result(x))


def _pointwise(x: Tensor, branches: Branches, form: Form) -> Tensor:
    x = x[:, :, :: branches.conv.stride[0], :: branches.conv.stride[1]]
    if form == "stacked":
        return _stacked(x, branches)
    y, mean, variance = PointwiseBranches.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, *_arrays(branches, False), branches.limits, branches.norms[0].eps, _group(branches.norms)
    )
    _update(branches, mean, variance)
    return y


def _stacked(x: Tensor, branches: Branches) -> Tensor:
    weight, eps = torch.cat(branches.weights).flatten(1), branches.norms[0].eps
    gamma, beta = (torch.cat([getattr(norm, name) for norm in branches.norms]) for name in ("weight", "bias"))
    mean, variance = torch.zeros_like(gamma), torch.zeros_like(beta)
    z = images_of(F.linear(rows_of(x), weight), x)
    z = F.batch_norm(z, mean, variance, gamma, beta, training=True, momentum=1.0, eps=eps)
    statistics = (tensor.view(len(branches.norms), -1) for tensor in (mean, variance))
    _update(branches, *statistics)  # with momentum 1 they are those of this batch
    y, *others = z.chunk(len(branches.norms), dim=1)
    for other in others:
        y = y + other
    if branches.bias is not None:
        y = y + 0.0 * branches.bias[:, None, None].to(y.dtype)
    return y if branches.limits is None else y.clamp_(*branches.limits)


def _arrays(branches: Branches, depthwise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameters of all branches as the Functions take them.

    They are weight [R, T, C] (depthwise) or [R, O, C], gamma [R, O] and beta [O].
    """
    optional = [tensor for tensor in (branches.scale, branches.bias) if tensor is not None]
    gammas, betas = ([getattr(norm, name) for norm in branches.norms] for name in ("weight", "bias"))
    return _Arrays.apply(branches, depthwise, *branches.weights, *optional, *gammas, *betas)  # pyright: ignore


class _Arrays(torch.autograd.Function):
    """One operation for all that a layer's parameters go through: as many small ones would cost more than the layer."""

    @staticmethod
    def forward(ctx: Any, branches: Branches, depthwise: bool, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.branches, ctx.depthwise = branches, depthwise
        weights = [weight.flatten(1).t() if depthwise else weight.flatten(1) for weight in branches.weights]
        (rows, columns), center = weights[0].shape, _center(branches.conv)
        if branches.scale is not None:
            weights.append(F.pad(branches.scale.view(1, columns), (0, 0, center, rows - 1 - center)))
        if branches.identity and depthwise:
            weights.append(F.pad(weights[0].new_ones(1, columns), (0, 0, center, rows - 1 - center)))
        elif branches.identity:
            weights.append(torch.eye(rows, dtype=weights[0].dtype, device=weights[0].device))
        gamma, beta = (torch.stack([getattr(norm, name) for norm in branches.norms]) for name in ("weight", "bias"))
        dtype = torch.float64 if depthwise else gamma.dtype
        return torch.stack(weights).to(dtype), gamma.to(dtype), beta.to(dtype).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        branches: Branches = ctx.branches
        weight, gamma, beta = (gradient.to(branches.norms[0].weight.dtype) for gradient in gradients)
        of_weights = zip(weight, branches.weights, strict=False)
        result = [(own.t() if ctx.depthwise else own).reshape(like.shape) for own, like in of_weights]
        if branches.scale is not None:
            result.append(weight[len(result), _center(branches.conv)].view_as(branches.scale))
        if branches.bias is not None:  # before a batch norm it changes nothing; DistributedDataParallel waits for zeros
            result.append(torch.zeros_like(branches.bias))
        return None, None, *result, *gamma, *[beta] * len(branches.norms)


def _center(conv: nn.Conv2d) -> int:
    row, column = center_tap(conv)
    return row * conv.kernel_size[1] + column


@torch.no_grad()
def _update(branches: Branches, mean: Tensor, variance: Tensor) -> None:
    """Update running statistics as batch norms do; mean and (unbiased) variance [R, O] are without the bias."""
    norms = branches.norms
    counts, means, variances = [], [], []
    for norm in norms:
        assert norm.num_batches_tracked is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        counts.append(norm.num_batches_tracked)
        means.append(norm.running_mean)
        variances.append(norm.running_var)
    torch._foreach_add_(counts, 1)
    factors = [1 / n.item() if norm.momentum is None else norm.momentum for n, norm in zip(counts, norms, strict=True)]
    found = torch.cat((mean, variance)).to(means[0].dtype)
    if branches.bias is not None:
        found[0] += branches.bias
    torch._foreach_lerp_(means + variances, found.unbind(), 2 * factors)


def _group(norms: Sequence[Norm]) -> dist.ProcessGroup | None:
    """The processes that share statistics, None for this one alone."""
    norm = norms[0]
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
