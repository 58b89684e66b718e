"""How the branches of a layer train: as one convolution where that is cheaper, with the same statistics and gradients.

Three forms, chosen for each layer from its shape (the alternative, one convolution and batch norm for each branch, is
what MultiBranchConv does by itself):

    depthwise   DepthwiseBranches: statistics from the Gram matrix of the patches; on a CPU
    closed      PointwiseBranches: statistics from the covariance of the input, for 1 x 1 kernels; anywhere
    stacked     one convolution and one batch norm with the channels of all branches, then their sum; for 1 x 1 kernels
                whose input is so much wider than their output that its covariance costs more

They know nothing but a branch's ordinary parameters and statistics, so checkpoints, EMA, evaluation and fold do not
depend on them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.students.depthwise import MOST_TAPS, DepthwiseBranches, Geometry, runs_here
from trainer.students.geometry import centre_tap, output_size, padding
from trainer.students.pointwise import PointwiseBranches

Form = Literal["depthwise", "closed", "stacked"]
BranchesAs = Literal["auto", "separate"]
Norm = nn.BatchNorm2d | nn.SyncBatchNorm  # a SyncBatchNorm is what a conversion leaves


class Branches(NamedTuple):
    """What the branches of a layer compute with."""

    conv: nn.Conv2d  # for its settings
    weights: tuple[Tensor, ...]  # of the k x k branches, [O, C / groups, k, k]
    bias: Tensor | None  # of the first, [O]
    scale: Tensor | None  # the weight of the 1 x 1 branch, [O, C / groups, 1, 1]
    identity: bool
    norms: Sequence[Norm]  # of all branches, in this order


def form_of(conv: nn.Conv2d, branches: int, identity: bool) -> Form | None:
    """The cheapest form in which `branches` copies of a convolution train; None: as separate branches.

    The products of a 1 x 1 layer with C inputs and O outputs cost, for each pixel, 3 R O C multiplications stacked and
    3 O C + 2 C C closed.
    """
    if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "same", "valid"):
        closed = 2 * conv.in_channels < 3 * (branches - 1) * conv.out_channels
        return "closed" if closed or identity else "stacked"
    small = max(conv.kernel_size) <= MOST_TAPS and conv.dilation == (1, 1)
    if small and conv.groups == conv.in_channels == conv.out_channels and runs_here():
        return "depthwise"
    return None


def trains_as_one(form: Form, x: Tensor, norms: Sequence[Norm]) -> bool:
    """Whether this batch can go through one convolution: all norms use its statistics, and the form runs here.

    One value for each channel is left to the batch norms, which raise an error; so is SyncBatchNorm, stacked.
    """
    if not all(norm.training for norm in norms) or len(x) * x.shape[2] * x.shape[3] <= 1:
        return False
    if form == "depthwise":
        return x.device.type == "cpu"
    return form == "closed" or _group(norms) is None


def sum_of_branches(form: Form, x: Tensor, branches: Branches) -> Tensor:
    """The sum of all branches of x, as MultiBranchConv gives it in training; running statistics are updated as well."""
    return {"depthwise": _depthwise, "closed": _closed, "stacked": _stacked}[form](x, branches)


@torch.compiler.disable  # the kernels are no operations that torch could compile
def _depthwise(x: Tensor, branches: Branches) -> Tensor:
    conv, channels = branches.conv, x.shape[1]
    height, width = conv.kernel_size
    taps, (row, column) = height * width, centre_tap(conv)
    centre = row * width + column
    kernels = [weight.view(channels, taps).t() for weight in branches.weights]
    if branches.scale is not None:
        kernels.append(F.pad(branches.scale.view(1, channels), (0, 0, centre, taps - 1 - centre)))
    if branches.identity:
        kernels.append(F.pad(x.new_ones(1, channels), (0, 0, centre, taps - 1 - centre)))
    before = tuple(padding(conv, axis, x.shape[2 + axis])[0] for axis in (0, 1))
    output = tuple(output_size(conv, axis, x.shape[2 + axis]) for axis in (0, 1))
    geometry = Geometry((height, width), _two(conv.stride), _two(before), _two(output))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
    gamma, beta = _affine(branches, torch.float64)
    eps, group = branches.norms[0].eps, _group(branches.norms)
    y, mean, variance = DepthwiseBranches.apply(  # pyright: ignore[reportGeneralTypeIssues]
        exact, torch.stack(kernels).double(), gamma, beta, geometry, eps, group
    )
    _update(branches, mean, variance)
    return y.to(dtype)


def _closed(x: Tensor, branches: Branches) -> Tensor:
    x = x[:, :, :: branches.conv.stride[0], :: branches.conv.stride[1]]
    kernels = [weight.flatten(1) for weight in branches.weights]
    if branches.identity:
        kernels.append(torch.eye(x.shape[1], dtype=kernels[0].dtype, device=x.device))
    weight = torch.stack(kernels)
    gamma, beta = _affine(branches, weight.dtype)
    eps, group = branches.norms[0].eps, _group(branches.norms)
    y, mean, variance = PointwiseBranches.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, gamma, beta, eps, group
    )
    _update(branches, mean, variance)
    return y


def _stacked(x: Tensor, branches: Branches) -> Tensor:
    norms = branches.norms
    z = F.conv2d(x, torch.cat(branches.weights), None, branches.conv.stride)
    mean, variance = (torch.zeros(z.shape[1], dtype=norms[0].weight.dtype, device=x.device) for _ in range(2))
    gamma, beta = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    z = F.batch_norm(z, mean, variance, gamma, beta, training=True, momentum=1.0, eps=norms[0].eps)
    _update(branches, mean.view(len(norms), -1), variance.view(len(norms), -1))
    z = z.unflatten(1, (len(norms), -1)).sum(1)
    return z if branches.bias is None else z + 0.0 * branches.bias.to(z.dtype)[:, None, None]


def _affine(branches: Branches, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gamma [R, O] of the norms and beta [O], the sum of theirs. The bias of a convolution before a batch norm changes
    nothing, but has a gradient of zeros, which DistributedDataParallel waits for."""
    gamma = torch.stack([norm.weight for norm in branches.norms]).to(dtype)
    beta = torch.stack([norm.bias for norm in branches.norms]).to(dtype).sum(0)
    return gamma, beta if branches.bias is None else beta + 0.0 * branches.bias.to(dtype)


@torch.no_grad()
def _update(branches: Branches, mean: Tensor, variance: Tensor) -> None:
    """Update running statistics as batch norms do; mean and (unbiased) variance [R, O] are without the bias."""
    for index, norm in enumerate(branches.norms):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        factor = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        own = mean[index] + branches.bias if index == 0 and branches.bias is not None else mean[index]
        norm.running_mean.lerp_(own.to(norm.running_mean.dtype), factor)
        norm.running_var.lerp_(variance[index].to(norm.running_var.dtype), factor)


def _group(norms: Sequence[Norm]) -> dist.ProcessGroup | None:
    """The processes that share statistics, None for this one alone."""
    norm = norms[0]
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _two(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second
