"""Which pixels a convolution reads: its padding, its output's size, where its center tap lies; and how it clamps."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

Limits = tuple[float, float]  # to which an activation clamps: (0, inf) is ReLU, (0, 6) ReLU6
NO_LIMITS: Limits = (-math.inf, math.inf)


class ConvGeometry(NamedTuple):
    """Pairs of rows and columns; `before` are the zeros above and to the left."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    output: tuple[int, int]


def center_tap(conv: nn.Conv2d) -> tuple[int, int]:
    """Return row and column, in the kernel, of the tap on which the 1 x 1 and identity branches lie."""
    return (conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2


def has_scale(conv: nn.Conv2d) -> bool:
    """Tell whether `conv` takes a 1 x 1 branch: beside a 1 x 1 convolution it would be one more of the same."""
    return max(conv.kernel_size) > 1


def has_identity(conv: nn.Conv2d) -> bool:
    """Tell whether `conv` takes an identity branch: every output pixel's center tap is the input pixel there."""
    if conv.in_channels != conv.out_channels or conv.stride != (1, 1):
        return False
    return all(_keeps_positions(conv, axis) for axis in (0, 1))


def under_center_tap(x: Tensor, conv: nn.Conv2d, output_size: tuple[int, int]) -> Tensor:
    """Return what a 1 x 1 convolution with the stride of `conv` must read to see each output pixel's center tap.

    Args:
        x: [N, C, H, W].
        conv: the convolution beside it.
        output_size: height and width of conv's output.

    Returns:
        x, cut and padded with zeros.
    """
    (top, bottom), (left, right) = (_margins(conv, axis, x.shape[axis - 2], output_size[axis]) for axis in (0, 1))
    if top == bottom == left == right == 0:
        return x
    return F.pad(x, (left, right, top, bottom))


def _margins(conv: nn.Conv2d, axis: int, size: int, output_size: int) -> tuple[int, int]:
    """Zeros to add, or where negative pixels to cut off, before and after an axis of `size` pixels."""
    stride = conv.stride[axis]
    start = center_tap(conv)[axis] * conv.dilation[axis] - padding(conv, axis, size)[0]
    left_over = size - (start + (output_size - 1) * stride + 1)
    # Fewer pixels than a stride make no further output: to cut them off would only cost a copy.
    return -start, 0 if 0 <= left_over < stride else -left_over


def _keeps_positions(conv: nn.Conv2d, axis: int) -> bool:
    """Whether, at stride 1, the padding makes up for the kernel on both sides of its center tap."""
    before = center_tap(conv)[axis] * conv.dilation[axis]
    after = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - before
    return padding(conv, axis, size=1) == (before, after)  # at stride 1 no padding depends on the size


def padding(conv: nn.Conv2d, axis: int, size: int) -> tuple[int, int]:
    """Return how many zeros `conv` puts before and after an axis of `size` pixels."""
    stride, reach = conv.stride[axis], conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if isinstance(conv, Conv2dSame):
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    elif isinstance(conv.padding, str):
        total = {"same": reach, "valid": 0}[conv.padding]
    else:
        total = 2 * conv.padding[axis]
    return total // 2, total - total // 2


def output_size(conv: nn.Conv2d, axis: int, size: int) -> int:
    """Return how many pixels the output has along an axis of `size` pixels."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    return (size + sum(padding(conv, axis, size)) - reach - 1) // conv.stride[axis] + 1


def two(values: tuple[int, ...]) -> tuple[int, int]:
    """Unpack what torch declares as any number of values: those of rows and columns."""
    rows, columns = values
    return rows, columns
