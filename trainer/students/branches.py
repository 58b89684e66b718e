"""A convolution with batch norm as several parallel branches that are summed: how an expanded student trains.

RepVGG (arXiv 2101.03697) adds a 1 x 1 and an identity branch to a convolution; MobileOne (arXiv 2206.04040) repeats
the convolution itself; GhostNetV3 (arXiv 2404.11202) trains compact students this way. Every branch has a batch norm
of its own. In evaluation mode all of it is affine, so that fold can write the sum as one convolution again.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from softshard.trainer.students.fused.conv_geometry import has_identity, has_scale, padding, two, under_center_tap
from softshard.trainer.students.fused.dispatch import (
    Branches,
    Form,
    Norm,
    form_of,
    form_of_batch,
    sum_of_branches,
)


@dataclass
class PlainPair:
    """What fold needs to bring a plain pair back."""

    conv: nn.Conv2d  # on the meta device: the type and the settings, no weights
    bn: nn.BatchNorm2d  # on the meta device, with empty places for its drop and act
    after: nn.Sequential  # the live module in the place of bn: what a BatchNormAct2d does after it, else nothing


# Activations that clamp, with their limits: a layer of branches computes them itself, which saves passes over memory.
_CLAMPING = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}


class ConvBN(nn.Module):
    """One branch: a convolution and its batch norm."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W']."""
        return self.bn(self.conv(x))


class MultiBranchConv(nn.Module):
    """Sum of `branches` k x k convolutions, a 1 x 1 convolution and the input itself, each through its own batch norm.

    [N, in_channels, H, W] -> [N, out_channels, H', W'], of the shape and dtype of the plain pair's output.

    The 1 x 1 branch (`scale_branch`) exists where k > 1, the identity branch where input and output have the same
    channels and the same pixels. Both see the pixels under the kernel's center tap, whatever the padding.
    Branch 0 takes over the parameters and buffers of `conv` and `bn`; the others start with the ordinary
    initialization of nn.Conv2d and gamma 0. So before the first step the sum equals the plain pair.
    The ReLU or ReLU6 of a BatchNormAct2d is applied here (`act`); any other, and its dropout, in `plain.after`, which
    belongs in the place of `bn`.

    In training all branches of a layer go through one convolution where that is cheaper, with the same results up to
    rounding (fused/dispatch.py); `implementation="separate"` always computes them one by one, "fused" through one
    wherever there is one, "triton" also depthwise layers on a GPU. `form_for` says what a batch goes through.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        *,
        branches: int,
        scale_branch: bool,
        identity: bool,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.act = _own_activation(bn)
        # In a dataclass the templates are no submodules: not in the state_dict, not moved, but copied with this module.
        self.plain = _plain_pair(conv, bn, self.act)
        self.branches = nn.ModuleList([_first_branch(conv, bn)])
        self.branches.extend(_new_branch(conv, bn) for _ in range(branches - 1))
        self.scale = _new_scale_branch(conv, bn) if scale_branch and has_scale(conv) else None
        self.identity = _zero_bn(bn) if identity and has_identity(conv) else None
        self.form: Form | None = form_of(conv, branches, self.identity is not None, implementation)
        self.always_fused = implementation == "fused"
        self.train(bn.training)

    def conv_bns(self) -> list[ConvBN]:
        """List the k x k branches."""
        return cast(list[ConvBN], list(self.branches))

    def norms(self) -> list[Norm]:
        """List the batch norms of all branches: k x k, 1 x 1, identity."""
        norms: list[Norm] = [branch.bn for branch in self.conv_bns()]
        if self.scale is not None:
            norms.append(self.scale.bn)
        if self.identity is not None:
            norms.append(self.identity)
        return norms

    def form_for(self, x: Tensor) -> Form | None:
        """Return the form in which the batch x [N, C, H, W] trains; None: as separate branches."""
        if self.form is None:
            return None
        return form_of_batch(self.form, self.plain.conv, x, self.norms(), self.always_fused)

    def forward(self, x: Tensor) -> Tensor:
        """Sum all branches, and apply the activation where this layer has taken it over."""
        form = self.form_for(x)
        if form is None:
            y = self._separately(x)
            return y if self.act is None else self.act(y)
        weights = tuple(branch.conv.weight for branch in self.conv_bns())
        scale = self.scale.conv.weight if self.scale is not None else None
        bias = self.conv_bns()[0].conv.bias
        limits = None if self.act is None else _CLAMPING[type(self.act)]
        branches = Branches(self.plain.conv, weights, bias, scale, self.identity is not None, self.norms(), limits)
        return sum_of_branches(form, x, branches)

    def _separately(self, x: Tensor) -> Tensor:
        conv = self.plain.conv
        padded = _pad_same(x, conv) if isinstance(conv, Conv2dSame) else x
        first, *others = self.conv_bns()
        y = first(padded)
        for branch in others:
            y = y + branch(padded)
        if self.scale is not None:
            y = y + self.scale(under_center_tap(x, conv, (y.shape[-2], y.shape[-1])))
        if self.identity is not None:
            y = y + self.identity(x)
        return y


def _pad_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a Conv2dSame does first, once for all branches."""
    height, width = x.shape[-2:]
    return F.pad(x, (*padding(conv, 1, width), *padding(conv, 0, height)))


def _own_activation(bn: nn.BatchNorm2d) -> nn.Module | None:
    """The activation of a BatchNormAct2d, where it clamps and nothing comes before it."""
    children = dict(bn.named_children())
    act, others = children.pop("act", None), children.values()
    return act if type(act) in _CLAMPING and all(isinstance(other, nn.Identity) for other in others) else None


def _plain_pair(conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module | None) -> PlainPair:
    template = copy.deepcopy(bn).to("meta")
    for name, _ in bn.named_children():
        setattr(template, name, nn.Identity())  # the live ones may learn (PReLU)
    after = nn.Sequential(OrderedDict((name, child) for name, child in bn.named_children() if child is not act))
    return PlainPair(copy.deepcopy(conv).to("meta"), template, after.train(bn.training))


def _first_branch(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
    """The plain pair in ordinary modules, with the very parameters and buffers that it had."""
    branch = _new_branch(conv, bn)
    branch.conv.weight, branch.conv.bias = conv.weight, conv.bias
    branch.bn.weight, branch.bn.bias = bn.weight, bn.bias
    for name, buffer in bn.named_buffers(recurse=False):
        setattr(branch.bn, name, buffer)
    return branch


def _new_branch(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
    padding = conv.padding if isinstance(conv.padding, str) else two(conv.padding)
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        two(conv.kernel_size),
        stride=two(conv.stride),
        padding=padding,  # a Conv2dSame has 0 here, and forward pads
        dilation=two(conv.dilation),
        groups=conv.groups,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return ConvBN(new, _zero_bn(bn))


def _new_scale_branch(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        1,
        stride=two(conv.stride),
        groups=conv.groups,
        bias=False,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return ConvBN(new, _zero_bn(bn))


def _zero_bn(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A new batch norm with the settings of `bn` and gamma 0."""
    zero = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, device=bn.weight.device, dtype=bn.weight.dtype)
    nn.init.zeros_(zero.weight)
    return zero
