"""Fold: write the branches of an expanded student as one convolution again, exactly.

In evaluation mode a convolution with kernel W and bias c, followed by a batch norm, is one affine map:

    gamma (W * x + c - mean) / sqrt(var + eps) + beta  =  (s W) * x  +  beta + s (c - mean)
    with s = gamma / sqrt(var + eps), one number for each output channel.

A 1 x 1 kernel is a k x k kernel with zeros around it, the identity is a 1 x 1 kernel with ones on its diagonal, and
the sum of convolutions of one input is the convolution with the sum of the kernels (RepVGG, arXiv 2101.03697,
section 3.3). All of this is done in float64, so that folding loses no more than the rounding of its result.
"""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fused.conv_geometry import center_tap

Affine = tuple[Tensor, Tensor]  # kernel [out, in / groups, height, width] and bias [out]; float64, on the CPU
_M = TypeVar("_M", nn.Conv2d, nn.BatchNorm2d)


def fold(model: nn.Module) -> nn.Module:
    """Make a plain model that computes, in evaluation mode, what the expanded `model` computes.

    Args:
        model: it is not changed. One that was never expanded comes back as an equal copy.

    Returns:
        A model of the stock architecture, with the stock modules under the stock names: its state_dict loads with
        strict=True into a newly built student. Dtypes, devices and training modes are those of `model`. The kernel of
        each folded pair is in its convolution (whose bias, if it has one, is 0) and the bias is in its batch norm,
        which is otherwise an identity: mean 0, variance 1, weight sqrt(1 + eps). So it can be trained or expanded
        again.

    Raises:
        ValueError: `model` is a part of a student that holds a convolution without the module of its batch norm.
    """
    folded = copy.deepcopy(model)
    names = {module: name for name, module in folded.named_modules()}
    for module, name in names.items():
        if isinstance(module, MultiBranchConv):
            if module.plain.after not in names:
                raise ValueError(f"{name}: the place of its batch norm is not in this module; fold the whole student")
            conv, bn = plain_pair(module)
            folded.set_submodule(name, conv)
            folded.set_submodule(names[module.plain.after], bn)
    return folded


@torch.no_grad()
def plain_pair(expanded: MultiBranchConv) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Make a convolution and a batch norm, of the types before expand, that do what `expanded` does."""
    kernel, bias = affine_of_sum(expanded)
    plain, first = expanded.plain, expanded.conv_bns()[0]
    conv = _materialized(plain.conv, first.conv)
    conv.weight.copy_(kernel)
    if conv.bias is not None:
        conv.bias.zero_()
    bn = _materialized(plain.bn, first.bn)
    bn.load_state_dict(
        {
            "weight": torch.full_like(bias, (1.0 + bn.eps) ** 0.5),
            "bias": bias,
            "running_mean": torch.zeros_like(bias),
            "running_var": torch.ones_like(bias),
            "num_batches_tracked": first.bn.num_batches_tracked,
        }
    )
    for name, child in plain.after.named_children():
        setattr(bn, name, child)
    if expanded.act is not None:
        bn.act = expanded.act
    return conv, bn


def affine_of_sum(expanded: MultiBranchConv) -> Affine:
    """Return the kernel and the bias of all branches together."""
    plain = expanded.plain.conv
    parts = [affine_of_conv_bn(branch.conv, branch.bn) for branch in expanded.conv_bns()]
    if expanded.scale is not None:
        kernel, bias = affine_of_conv_bn(expanded.scale.conv, expanded.scale.bn)
        parts.append((at_center_tap(kernel, plain), bias))
    if expanded.identity is not None:
        kernel, bias = affine_of_bn(identity_kernel(plain), torch.zeros(()), expanded.identity)
        parts.append((at_center_tap(kernel, plain), bias))
    kernels, biases = zip(*parts, strict=True)
    return torch.stack(kernels).sum(0), torch.stack(biases).sum(0)


def affine_of_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Affine:
    """Return the kernel and the bias of a convolution followed by a batch norm."""
    bias = torch.zeros(()) if conv.bias is None else conv.bias
    return affine_of_bn(_float64(conv.weight), _float64(bias), bn)


def affine_of_bn(kernel: Tensor, bias: Tensor, bn: nn.BatchNorm2d) -> Affine:
    """Return what `bn` makes of a convolution with this kernel and bias: the formula at the head of this file."""
    gamma, beta, mean, var = (_float64(tensor) for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    s = gamma / torch.sqrt(var + bn.eps)
    return kernel * s[:, None, None, None], beta + s * (bias - mean)


def at_center_tap(kernel: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad a 1 x 1 kernel to conv's size, so that it is at the center tap."""
    (height, width), (row, column) = conv.kernel_size, center_tap(conv)
    return F.pad(kernel, (column, width - 1 - column, row, height - 1 - row))


def identity_kernel(conv: nn.Conv2d) -> Tensor:
    """Make the 1 x 1 kernel with which a convolution of conv's channels and groups returns its input."""
    per_group = conv.in_channels // conv.groups
    return torch.eye(per_group, dtype=torch.float64).repeat(conv.groups, 1)[:, :, None, None]


def _materialized(template: _M, like: _M) -> _M:
    """A copy of a template on the meta device, with memory of the device, dtype and mode of `like`."""
    module = copy.deepcopy(template).to_empty(device=like.weight.device)
    return module.to(like.weight.dtype).train(like.training)


def _float64(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # expand takes no batch norm without affine parameters and running statistics
    return tensor.detach().cpu().double()  # first to the CPU: not every device has float64
