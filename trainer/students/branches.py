"""A convolution with batch norm as several parallel branches that are summed: how an expanded student trains.

RepVGG (arXiv 2101.03697) adds a 1 x 1 and an identity branch to a convolution; MobileOne (arXiv 2206.04040) repeats
the convolution itself; GhostNetV3 (arXiv 2404.11202) trains compact students this way. Every branch has a batch norm
of its own. In evaluation mode all of it is affine, so that fold can write the sum as one convolution again.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


@dataclass
class PlainPair:
    """What fold needs to bring a plain pair back."""

    conv: nn.Conv2d  # on the meta device: the type and the settings, no weights
    bn: nn.BatchNorm2d  # on the meta device, with empty places for its drop and act
    after: nn.Sequential  # the live module in the place of bn: the drop and act of a BatchNormAct2d, else nothing


class ConvBN(nn.Module):
    """One branch: a convolution and its batch norm."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class MultiBranchConv(nn.Module):
    """Sum of `branches` k x k convolutions, a 1 x 1 convolution and the input itself, each through its own batch norm.

    [N, in_channels, H, W] -> [N, out_channels, H', W'], of the shape and dtype of the plain pair's output.

    The 1 x 1 branch (`scale`) exists where k > 1, the identity branch where input and output have the same channels
    and the same pixels. Both see the pixels under the kernel's centre tap, whatever the padding.
    Branch 0 takes over the parameters and buffers of `conv` and `bn`; the others start with the ordinary
    initialisation of nn.Conv2d and gamma 0. So before the first step the sum equals the plain pair, in both modes.
    The activation of a BatchNormAct2d is not applied here but in `plain.after`, which belongs in the place of `bn`.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, *, branches: int, scale: bool, identity: bool) -> None:
        super().__init__()
        # In a dataclass the templates are no submodules: not in the state_dict, not moved, but copied with this module.
        self.plain = _plain_pair(conv, bn)
        self.branches = nn.ModuleList([_first_branch(conv, bn)])
        self.branches.extend(_new_branch(conv, bn) for _ in range(branches - 1))
        self.scale = _new_scale_branch(conv, bn) if scale and has_scale(conv) else None
        self.identity = _zero_bn(bn) if identity and has_identity(conv) else None
        self.train(bn.training)

    def conv_bns(self) -> list[ConvBN]:
        """The k x k branches."""
        return cast(list[ConvBN], list(self.branches))

    def forward(self, x: Tensor) -> Tensor:
        conv = self.plain.conv
        padded = _pad_same(x, conv) if isinstance(conv, Conv2dSame) else x
        first, *others = self.conv_bns()
        y = first(padded)
        for branch in others:
            y = y + branch(padded)
        if self.scale is not None:
            y = y + self.scale(under_centre_tap(x, conv, (y.shape[-2], y.shape[-1])))
        if self.identity is not None:
            y = y + self.identity(x)
        return y


def centre_tap(conv: nn.Conv2d) -> tuple[int, int]:
    """Row and column, in the kernel, of the tap on which the 1 x 1 and identity branches lie."""
    return (conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2


def has_scale(conv: nn.Conv2d) -> bool:
    """Whether `conv` takes a 1 x 1 branch: beside a 1 x 1 convolution it would be one more of the same."""
    return max(conv.kernel_size) > 1


def has_identity(conv: nn.Conv2d) -> bool:
    """Whether `conv` takes an identity branch: the centre tap of every output pixel is the input pixel in its place."""
    if conv.in_channels != conv.out_channels or conv.stride != (1, 1):
        return False
    return all(_keeps_places(conv, axis) for axis in (0, 1))


def under_centre_tap(x: Tensor, conv: nn.Conv2d, output_size: tuple[int, int]) -> Tensor:
    """What a 1 x 1 convolution with the stride of `conv` must read to see, for each output pixel, its centre tap.

    x [N, C, H, W], cut and padded with zeros; `output_size` is the height and width of conv's output.
    """
    (top, bottom), (left, right) = (_margins(conv, axis, x.shape[axis - 2], output_size[axis]) for axis in (0, 1))
    if top == bottom == left == right == 0:
        return x
    return F.pad(x, (left, right, top, bottom))


def _margins(conv: nn.Conv2d, axis: int, size: int, output_size: int) -> tuple[int, int]:
    """Zeros to add, or where negative pixels to cut off, before and after an axis of `size` pixels."""
    stride = conv.stride[axis]
    start = centre_tap(conv)[axis] * conv.dilation[axis] - _padding(conv, axis, size)[0]
    left_over = size - (start + (output_size - 1) * stride + 1)
    # Fewer pixels than a stride make no further output: to cut them off would only cost a copy.
    return -start, 0 if 0 <= left_over < stride else -left_over


def _keeps_places(conv: nn.Conv2d, axis: int) -> bool:
    """Whether, at stride 1, the padding makes up for the kernel on both sides of its centre tap."""
    before = centre_tap(conv)[axis] * conv.dilation[axis]
    after = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - before
    return _padding(conv, axis, size=1) == (before, after)  # at stride 1 no padding depends on the size


def _padding(conv: nn.Conv2d, axis: int, size: int) -> tuple[int, int]:
    """Zeros that `conv` puts before and after an axis of `size` pixels."""
    stride, reach = conv.stride[axis], conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if isinstance(conv, Conv2dSame):
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    elif isinstance(conv.padding, str):
        total = {"same": reach, "valid": 0}[conv.padding]
    else:
        total = 2 * conv.padding[axis]
    return total // 2, total - total // 2


def _pad_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a Conv2dSame does first, once for all branches."""
    height, width = x.shape[-2:]
    return F.pad(x, (*_padding(conv, 1, width), *_padding(conv, 0, height)))


def _plain_pair(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> PlainPair:
    template = copy.deepcopy(bn).to("meta")
    for name, _ in bn.named_children():
        setattr(template, name, nn.Identity())  # the live ones are in `after`: they may learn (PReLU)
    after = nn.Sequential(OrderedDict(bn.named_children()))
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
    padding = conv.padding if isinstance(conv.padding, str) else _two(conv.padding)
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        _two(conv.kernel_size),
        stride=_two(conv.stride),
        padding=padding,  # a Conv2dSame has 0 here, and forward pads
        dilation=_two(conv.dilation),
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
        stride=_two(conv.stride),
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


def _two(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
