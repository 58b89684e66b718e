"""The sums over pixels of DepthwiseBranches on a GPU, in Triton.

Only ever run in Triton's interpreter, on a CPU: nobody has yet measured or tested these kernels on a GPU. Until someone
has, they are off unless `implementation` is triton.

Images lie channels last, as for the kernels in C, whose roles these functions have. Two patches that share a pixel
differ in few ways: what matters is how far two pixels are apart, and under which taps the first lies. So every product
is computed once:

    gram       the sum over the batch alone of each pixel times those up to a kernel's size after it; then each entry of
               the Gram matrix is a sum over the pixels under its first tap
    correlate  likewise, of each pixel of the gradient times those of its patch
    backward   one stencil over x, whose coefficients depend on the taps that the pixel lies under, and the transposed
               convolution of the gradient

Sums over the batch are in the dtype of x, those over pixels in float64. Nothing depends on the order in which programs
run, so results are the same every time.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softshard.trainer.students.fused.conv_geometry import NO_LIMITS, ConvGeometry, Limits

TILE, CHANNELS = 256, 16  # pixels times partners, and channels, of a program: 4096 numbers, 32 for each of its threads
IMAGES, PIXELS = 4, 16  # of a program of a convolution


def gram(x: Tensor, geometry: ConvGeometry, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrices [T, T, C] and the sums [T, C] of the patches minus shift [C].

    Zeros of the padding are shifted, too.
    """
    (rows, columns), stride = geometry.kernel, geometry.stride
    line, reach = 2 * columns - 1, [(n - 1) * s + 1 for n, s in zip(geometry.output, stride, strict=True)]
    size = (reach[0] + rows - 1, reach[1] + columns - 1)
    partners = (rows - 1) * line + columns  # pixels after this one, line by line, from itself on
    found = _products(x, geometry.before, x, geometry.before, (1, 1), size, (columns - 1, line, partners), shift)
    found = found.unfold(0, reach[0], 1)[..., :: stride[0]].sum(-1, dtype=torch.float64)
    found = found.unfold(1, reach[1], 1)[..., :: stride[1]].sum(-1).flatten(0, 1)
    tap = torch.arange(rows * columns, device=x.device)
    position = tap // columns * line + tap % columns
    first = torch.minimum(tap[:, None], tap)
    return found[first, (position[:, None] - position).abs()], found[:, partners]


def moments(gram: Tensor, sums: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance [R, C] of each branch, and the covariance of the patches times each weight [R, T, C]."""
    mean = sums / count
    product = torch.einsum("tuc,ruc->rtc", gram / count - mean[:, None] * mean, weight)
    return (weight * mean).sum(1), (weight * product).sum(1), product


def forward(x: Tensor, geometry: ConvGeometry, kernel: Tensor, bias: Tensor, limits: Limits | None) -> Tensor:
    """Convolve x with kernel [T, C], add bias [C] and clamp to the limits."""
    size = (len(x), x.shape[1], *geometry.output)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    low, high = limits or NO_LIMITS
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(y)](x, kernel.to(x.dtype), bias.to(x.dtype), y, low, high, *_sizes(x, geometry))
    return y


def correlate(
    x: Tensor, geometry: ConvGeometry, dy: Tensor, y: Tensor | None, limits: Limits | None
) -> tuple[Tensor, Tensor]:
    """Return the correlation [T, C] of the gradient before the activation with the patches, and the sums [C] of it."""
    taps, columns = geometry.kernel[0] * geometry.kernel[1], geometry.kernel[1]
    dy, nothing = _through(dy, y, limits), torch.zeros(x.shape[1], device=x.device)
    partners = (0, columns, taps)
    found = _products(dy, (0, 0), x, geometry.before, geometry.stride, geometry.output, partners, nothing)
    found = found.sum((0, 1), dtype=torch.float64)
    return found[:taps], found[taps]


def backward(
    x: Tensor,
    geometry: ConvGeometry,
    dy: Tensor,
    y: Tensor | None,
    limits: Limits | None,
    kernel: Tensor,
    weight: Tensor,
    q_factor: Tensor,
    offset: Tensor,
    means: Tensor,
) -> Tensor:
    """Return the gradient of x: that of K (dy - mean dy) - Q p + offset, spread over the patches p.

    kernel K and offset [T, C], weight [R, T, C], q_factor [R, C], the means of dy [C]; Q = sum q_factor w w'.
    """
    dx, dy = torch.empty_like(x), _through(dy, y, limits)
    rows, columns = (_classes(geometry, axis, x.shape[2 + axis], x.device) for axis in (0, 1))
    table = _stencils(geometry, rows[0], columns[0], weight, q_factor, offset - kernel * means).to(x.dtype)
    arrays = (kernel.to(x.dtype), table, rows[1], columns[1], len(columns[0]))
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x)](x, dy, *arrays, dx, *_sizes(x, geometry))
    return dx


def _through(dy: Tensor, y: Tensor | None, limits: Limits | None) -> Tensor:
    """The gradient before an activation, from the one after it."""
    return dy if y is None else torch.ops.aten.hardtanh_backward(dy, y, *(limits or NO_LIMITS))


def _sizes(x: Tensor, geometry: ConvGeometry) -> tuple[Any, ...]:
    """Integers, of which kernels call some constexpr."""
    kernel, stride, before, output = geometry
    return (*x.shape, *output, *before, *kernel, *stride, IMAGES, PIXELS, CHANNELS)


def _grid(result: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = result.shape
    return triton.cdiv(batch, IMAGES), triton.cdiv(height * width, PIXELS), triton.cdiv(channels, CHANNELS)


def _products(
    left: Tensor,
    left_before: tuple[int, int],
    right: Tensor,
    right_before: tuple[int, int],
    stride: tuple[int, int],
    size: tuple[int, int],
    partners: tuple[int, int, int],
    shift: Tensor,
) -> Tensor:
    """Sum over the batch each pixel of `left` times P pixels of `right`, and the pixel itself, all minus shift [C].

    The result is [rows, columns, P + 1, C]. `size` is the rows and columns of `left`, counted from `left_before` zeros
    before it on. `partners` are (first, line, P): the pixels of `right` from the one that belongs to the pixel on, in
    lines of a length, which start `first` pixels before it.
    """
    channels, count = left.shape[1], partners[2]
    result = torch.empty(*size, count + 1, channels, dtype=left.dtype, device=left.device)
    block = triton.next_power_of_2(count + 1)
    columns = max(1, TILE // block)
    grid = (size[0], triton.cdiv(size[1], columns), triton.cdiv(channels, CHANNELS))
    images = (*left.shape, *left_before, *right.shape[2:], *right_before)
    sizes: tuple[Any, ...] = (*images, size[1], *stride, *partners, block, columns, CHANNELS)
    with torch.cuda.device_of(left):
        _products_kernel[grid](left, right, shift.to(left.dtype), result, *sizes)
    return result


@functools.cache
def _classes(geometry: ConvGeometry, axis: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sets of taps, each [k] of 0 and 1, that rows (axis 0) or columns lie under, and for each which it is."""
    tap = torch.arange(geometry.kernel[axis])
    start = torch.arange(size)[:, None] + geometry.before[axis] - tap
    stride = geometry.stride[axis]
    under = (start >= 0) & (start % stride == 0) & (start < geometry.output[axis] * stride)
    sets, which = under.unique(dim=0, return_inverse=True)
    return sets.double().to(device), which.int().to(device)


def _stencils(
    geometry: ConvGeometry, rows: Tensor, columns: Tensor, weight: Tensor, q_factor: Tensor, constant: Tensor
) -> Tensor:
    """Return the coefficients of the pixels near a pixel in the gradient of x.

    [A, B, D + 1, C]: for pixels under each of A sets of rows and B of columns of taps, those of the D pixels nearer
    than a kernel's size, line by line, and last the constant.
    """
    height, width = geometry.kernel
    taps, channels = constant.shape
    tap = torch.arange(taps, device=weight.device)
    position = tap // width * (2 * width - 1) + tap % width
    distance = position - position[:, None] + position[-1]
    by_tap = weight.new_zeros(taps, (2 * height - 1) * (2 * width - 1) + 1, channels)
    by_tap[tap[:, None], distance] = -torch.einsum("rc,rtc,ruc->tuc", q_factor, weight, weight)
    by_tap[:, -1] = constant
    return torch.einsum("ay,bx,yxdc->abdc", rows, columns, by_tap.unflatten(0, (height, width)))


# Sizes are not told apart by what divides them, or many of a network's layers would be compiled anew. The channels
# are: on them depends how much is loaded at once.
_SIZES = (
    "batch", "height", "width", "out_height", "out_width", "top", "before", "left_height", "left_width", "left_top",
    "left_before", "right_height", "right_width", "right_top", "right_before", "stride_y", "stride_x", "first", "line",
    "count", "column_sets",
)  # fmt: skip


@triton.jit
def _pixels(images, n, y, x, c, batch, height, width, channels):
    """Pixels of images [batch, height, width, channels]; zeros outside of them."""
    inside = (n < batch) & (y >= 0) & (y < height) & (x >= 0) & (x < width) & (c < channels)
    address = ((tl.cast(n, tl.int64) * height + y) * width + x) * channels + c
    return tl.load(images + address, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _products_kernel(
    left, right, shift, result, batch, channels, left_height, left_width, left_top, left_before, right_height,
    right_width, right_top, right_before, width, stride_y, stride_x, first, line, count,
    PARTNERS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    y = tl.program_id(0)
    p = tl.arange(0, PARTNERS)[:, None, None]
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :, None]
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    shifted = tl.load(shift + c, mask=c < channels, other=0.0)
    other_y = y * stride_y - right_top + (p + first) // line
    other_x = x * stride_x - right_before + (p + first) % line - first
    total = tl.zeros((PARTNERS, COLUMNS, CHANNELS), left.dtype.element_ty)
    for n in range(batch):
        a = _pixels(left, n, y - left_top, x - left_before, c, batch, left_height, left_width, channels) - shifted
        b = _pixels(right, n, other_y, other_x, c, batch, right_height, right_width, channels) - shifted
        total += a * tl.where(p == count, 1.0, b)
    address = ((y * width + x) * (count + 1) + p) * channels + c
    tl.store(result + address, total, mask=(x < width) & (p <= count) & (c < channels))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x, kernel, bias, result, low, high, batch, channels, height, width, out_height, out_width, top, before,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)[:, None, None]
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :, None]
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    y, left = p // out_width * STRIDE_Y - top, p % out_width * STRIDE_X - before
    v = tl.zeros((IMAGES, PIXELS, CHANNELS), x.dtype.element_ty) + tl.load(bias + c, mask=c < channels, other=0.0)
    for i in range(KERNEL_HEIGHT):
        for j in range(KERNEL_WIDTH):
            at = _pixels(x, n, y + i, left + j, c, batch, height, width, channels)
            v += tl.load(kernel + (i * KERNEL_WIDTH + j) * channels + c, mask=c < channels, other=0.0) * at
    v = tl.where(v < low, low, tl.where(v > high, high, v))  # unlike tl.clamp, this keeps NaN, as torch does
    address = (tl.cast(n, tl.int64) * out_height * out_width + p) * channels + c
    tl.store(result + address, v, mask=(n < batch) & (p < out_height * out_width) & (c < channels))


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    x, dy, kernel, table, row_set, column_set, column_sets, result,
    batch, channels, height, width, out_height, out_width, top, before,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    LINE: tl.constexpr = 2 * KERNEL_WIDTH - 1
    NEAR: tl.constexpr = (2 * KERNEL_HEIGHT - 1) * LINE
    n = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)[:, None, None]
    p = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :, None]
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    y, column, inside = p // width, p % width, (p < height * width) & (c < channels)
    rows = tl.load(row_set + y, mask=y < height, other=0)
    own = (rows * column_sets + tl.load(column_set + column)) * (NEAR + 1)
    v = tl.zeros((IMAGES, PIXELS, CHANNELS), x.dtype.element_ty)
    v += tl.load(table + (own + NEAR) * channels + c, mask=inside, other=0.0)
    for i in range(2 * KERNEL_HEIGHT - 1):
        for j in range(LINE):
            near_y, near_x = y + i - (KERNEL_HEIGHT - 1), column + j - (KERNEL_WIDTH - 1)
            at = _pixels(x, n, near_y, near_x, c, batch, height, width, channels)
            v += tl.load(table + (own + i * LINE + j) * channels + c, mask=inside, other=0.0) * at
    for i in range(KERNEL_HEIGHT):
        out_y = tl.where((y + top - i) % STRIDE_Y == 0, (y + top - i) // STRIDE_Y, -1)
        for j in range(KERNEL_WIDTH):
            out_x = tl.where((column + before - j) % STRIDE_X == 0, (column + before - j) // STRIDE_X, -1)
            at = _pixels(dy, n, out_y, out_x, c, batch, out_height, out_width, channels)
            v += tl.load(kernel + (i * KERNEL_WIDTH + j) * channels + c, mask=c < channels, other=0.0) * at
    address = (tl.cast(n, tl.int64) * height * width + p) * channels + c
    tl.store(result + address, v, mask=(n < batch) & inside)
