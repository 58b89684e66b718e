"""All branches of a depthwise convolution through one convolution, with exact batch statistics.

Let p be the patch of k x k = T pixels of one channel under an output pixel (zeros in the padding), with mean m and
covariance S over the batch. A branch with kernel w gives z = w.p, so its mean is w.m and its variance w.Sw: the
statistics of every branch follow from the T x T Gram matrix of the patches, computed once. A 1 x 1 branch and the
identity are kernels that are zero but at the center tap. With a = gamma / sqrt(variance + eps), the sum of the
normalized branches is one convolution with kernel K = sum a w and bias beta - K.m.

Backward, let D = sum of dy (p - m) over the batch of M patches: one correlation. For each branch

    d gamma = g = w.D / sqrt(variance + eps)
    d w     = a (D - g / sqrt(variance + eps) Sw)
    d p     = K (dy - mean dy) - Q (p - m),  Q = sum a g / (sqrt(variance + eps) M) w w'

which is what backpropagation through each branch would give. Only x is kept for it. The sums over pixels are kernels in
C (_depthwise.c), on a GPU in Triton (depthwise_triton.py); the algebra, on arrays as small as the weights, is here, in
float64.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from softshard.trainer.students.fused.conv_geometry import NO_LIMITS, ConvGeometry, Limits

try:
    from softshard.trainer.students.fused import _depthwise  # pyright: ignore[reportAttributeAccessIssue]  (compiled)
except ImportError:  # a source tree that was copied to a machine without a compiler
    _depthwise = None

CHEAP_TAPS = 7  # rows or columns of a kernel: larger ones are cheaper as separate branches
MOST_TAPS = 13  # up to which these kernels are tested
CACHE_LINE = 64  # bytes: threads share none
_library = ctypes.CDLL(_depthwise.__file__) if _depthwise else None
_RUNS_HERE = _library is not None and bool(_library.softshard_depthwise_runs_here())
_SUFFIX = {torch.float32: "_float32", torch.float64: "_float64"}


def runs_here() -> bool:
    """Tell whether the kernels in C are there and this processor has the instructions they were compiled for."""
    return _RUNS_HERE


class Kernels(NamedTuple):
    """The sums over pixels on one kind of device; depthwise_triton.py says what each gives."""

    gram: Callable[..., tuple[Tensor, Tensor]]
    moments: Callable[..., tuple[Tensor, Tensor, Tensor]]
    forward: Callable[..., Tensor]
    correlate: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]


def kernels_for(device: str) -> Kernels:
    """Choose the kernels for a type of device: those in C for "cpu", those in Triton for any other."""
    if device == "cpu":
        return Kernels(_gram, _moments, _forward, _correlate, _backward)
    from softshard.trainer.students.fused import depthwise_triton as triton  # without a GPU there may be no Triton

    return Kernels(triton.gram, triton.moments, triton.forward, triton.correlate, triton.backward)


class DepthwiseBranches(torch.autograd.Function):
    """(x, weight, gamma, beta, geometry, limits, eps, group) -> (y, mean, variance).

    x [N, C, H, W], float32 or float64; weight [R, T, C] and gamma [R, C] of R branches and beta [C], the sum of theirs,
    float64. y [N, C, H', W'] of the dtype of x, channels last; mean and (unbiased) variance [R, C], float64, are for
    the running statistics alone. y is clamped to `limits`, if given (ReLU, ReLU6), and then kept for the backward pass.
    With a process group, statistics are those of all its processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        geometry: ConvGeometry,
        limits: Limits | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        x = x.contiguous(memory_format=torch.channels_last)
        weight, gamma = weight.contiguous(), gamma.contiguous()
        kernels = kernels_for(x.device.type)
        gram, sums, shift, count = _patch_sums(kernels, x, geometry, group)
        mean, variance, product = kernels.moments(gram, sums, weight, count)
        mean += shift * weight.sum(1)
        deviation = (variance.clamp_(min=0) + eps).rsqrt_()
        factor = gamma * deviation
        kernel = (weight * factor[:, None]).sum(0)
        patch_mean = sums / count + shift
        bias = beta - (kernel * patch_mean).sum(0)
        y = kernels.forward(x, geometry, kernel, bias, limits)
        ctx.save_for_backward(x, y if limits else None, weight, product, patch_mean, mean, deviation, factor, kernel)
        ctx.geometry, ctx.count, ctx.group, ctx.limits = geometry, count, group, limits
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x, weight, gamma and beta, by the formulas at the head of this file."""
        x, y, weight, product, patch_mean, mean, deviation, factor, kernel = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        kernels = kernels_for(x.device.type)
        correlation, beta_gradient = kernels.correlate(x, ctx.geometry, dy, y, ctx.limits)
        processes = sum_over(ctx.group, correlation, beta_gradient)
        centered = correlation - beta_gradient * patch_mean
        gamma_gradient = (weight * centered).sum(1) * deviation
        weight_gradient = factor[:, None] * (centered - (gamma_gradient * deviation)[:, None] * product)
        q_factor = factor * gamma_gradient * deviation / ctx.count
        offset = (weight * (q_factor * mean)[:, None]).sum(0)
        arrays = (kernel, weight, q_factor, offset, beta_gradient / ctx.count)
        dx = kernels.backward(x, ctx.geometry, dy, y, ctx.limits, *arrays)
        gradients = average_over_ranks(processes, weight_gradient, gamma_gradient, beta_gradient)
        return dx, *gradients, None, None, None, None


def sum_over(group: dist.ProcessGroup | None, *tensors: Tensor) -> int:
    """Replace tensors by their sums over the processes of a group.

    Returns:
        How many processes there are; 1 without a group.
    """
    if group is None:
        return 1
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
    return dist.get_world_size(group)


def average_over_ranks(processes: int, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Divide gradients that are sums over all processes by their number: DistributedDataParallel averages them."""
    return gradients if processes == 1 else tuple(gradient / processes for gradient in gradients)


def total_of(group: dist.ProcessGroup | None, number: int, device: torch.device) -> int:
    """Return the sum of a number over the processes of a group."""
    if group is None:
        return number
    total = torch.tensor(number, device=device)
    sum_over(group, total)
    return int(total)


def _patch_sums(
    kernels: Kernels, x: Tensor, geometry: ConvGeometry, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The Gram matrices [T, T, C] and the sums [T, C] of the patches minus a shift [C], and the number of patches."""
    # A row of each image says about where the mean is. Near it, variances are not differences of large numbers.
    shift = x[:, :, x.shape[2] // 2].mean((0, 2)).double()
    shift /= sum_over(group, shift)
    # In images smaller than the kernel some taps see nothing but padding: their variance, 0, is a difference of sums.
    exact = x.double() if x.shape[2] < geometry.kernel[0] or x.shape[3] < geometry.kernel[1] else x
    gram, sums = kernels.gram(exact, geometry, shift)
    count = total_of(group, len(x) * geometry.output[0] * geometry.output[1], x.device)
    sum_over(group, gram, sums)
    return gram, sums, shift, count


def _gram(x: Tensor, geometry: ConvGeometry, shift: Tensor) -> tuple[Tensor, Tensor]:
    channels, taps = x.shape[1], geometry.kernel[0] * geometry.kernel[1]
    gram, sums = shift.new_empty(taps, taps, channels), shift.new_empty(taps, channels)
    _call("gram", x, geometry, x, shift, gram, sums)
    return gram, sums


def _forward(x: Tensor, geometry: ConvGeometry, kernel: Tensor, bias: Tensor, limits: Limits | None) -> Tensor:
    size = (len(x), x.shape[1], *geometry.output)
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    _call("forward", x, geometry, x, kernel, bias, *(limits or NO_LIMITS), y)
    return y


def _correlate(
    x: Tensor, geometry: ConvGeometry, dy: Tensor, y: Tensor | None, limits: Limits | None
) -> tuple[Tensor, Tensor]:
    channels, taps = x.shape[1], geometry.kernel[0] * geometry.kernel[1]
    correlation, sums = x.new_empty(taps, channels, dtype=torch.float64), x.new_empty(channels, dtype=torch.float64)
    _call("correlate", x, geometry, x, dy, y, *(limits or NO_LIMITS), correlation, sums)
    return correlation, sums


def _backward(
    x: Tensor, geometry: ConvGeometry, dy: Tensor, y: Tensor | None, limits: Limits | None, kernel: Tensor,
    weight: Tensor, *others: Tensor,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(x)
    _call("backward", x, geometry, x, dy, y, *(limits or NO_LIMITS), kernel, weight, len(weight), *others, dx)
    return dx


def _moments(gram: Tensor, sums: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [R, C] of each branch, and the covariance of the patches times each weight [R, T, C]."""
    branches, taps, channels = weight.shape
    mean, variance = weight.new_empty(branches, channels), weight.new_empty(branches, channels)
    product = torch.empty_like(weight)
    tensors = (gram, sums, weight, mean, variance, product)
    assert _library is not None  # runs_here was asked before
    _library.softshard_depthwise_moments(
        *map(ctypes.c_int64, (channels, taps, branches)), ctypes.c_double(count), *map(_argument, tensors)
    )
    return mean, variance, product


def _shape(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The struct Shape of _depthwise.c."""
    pairs = (geometry.output, geometry.kernel, geometry.stride, geometry.before)
    return torch.tensor([len(x), x.shape[1], *x.shape[2:], *(value for pair in pairs for value in pair)])


def _call(name: str, x: Tensor, geometry: ConvGeometry, *arguments: Tensor | float | None) -> None:
    """Call a kernel for the dtype of x on all channels, some of them in each of torch's threads."""
    function = getattr(_library, f"softshard_depthwise_{name}{_SUFFIX[x.dtype]}")
    converted, channels, shape = [_argument(argument) for argument in arguments], x.shape[1], _shape(x, geometry)
    group = CACHE_LINE // x.element_size()
    groups = -(-channels // group)
    threads = min(torch.get_num_threads(), groups)

    def run(thread: int) -> int:
        first, last = (group * (groups * edge // threads) for edge in (thread, thread + 1))
        return function(_argument(shape), _argument(first), _argument(min(last, channels)), *converted)

    failed = map(run, range(1)) if threads == 1 else _pool(os.getpid(), threads).map(run, range(threads))
    if any(failed):
        raise MemoryError(f"depthwise branches: no memory for {threads} buffers; lower the number of threads")


def _argument(value: Tensor | float | None) -> Any:
    """A float is a double, an int an int64_t, None a null pointer."""
    if isinstance(value, float):
        return ctypes.c_double(value)
    return (
        ctypes.c_int64(value)
        if isinstance(value, int)
        else ctypes.c_void_p(value.data_ptr() if value is not None else 0)
    )


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork does not inherit them."""
    return ThreadPoolExecutor(threads, "depthwise")
