"""The kernels for GPUs: run in Triton's interpreter, on the CPU, and compiled for GPUs that are not there."""

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_branches import Forms, batch, both_forms, errors, norm, step
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from softshard.pipeline.runtime.errors import RecipeError
from softshard.trainer.students import expand
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fused import depthwise
from softshard.trainer.students.fused.conv_geometry import ConvGeometry

pytest.importorskip("triton")

# batch and channels, height and width, kernel, stride, zeros before, output
SHAPES = [
    ((2, 3), (7, 9), ConvGeometry((3, 3), (1, 1), (1, 1), (7, 9))),
    ((5, 1), (2, 17), ConvGeometry((3, 3), (1, 1), (1, 1), (2, 17))),  # several programs for images, rows and columns
    ((3, 2), (8, 6), ConvGeometry((3, 3), (2, 2), (1, 1), (4, 3))),
    ((2, 5), (4, 17), ConvGeometry((2, 4), (2, 2), (1, 2), (2, 9))),
    ((5, 1), (1, 9), ConvGeometry((1, 5), (1, 1), (0, 2), (1, 9))),
    ((2, 2), (9, 1), ConvGeometry((5, 1), (1, 1), (2, 0), (9, 1))),
    ((1, 4), (5, 6), ConvGeometry((5, 5), (1, 1), (2, 2), (5, 6))),
    ((2, 1), (6, 5), ConvGeometry((5, 5), (2, 2), (2, 2), (3, 3))),
    ((2, 3), (3, 3), ConvGeometry((3, 3), (2, 2), (0, 0), (1, 1))),
    ((2, 1), (2, 2), ConvGeometry((5, 5), (1, 1), (2, 2), (2, 2))),  # every pixel lies under a set of taps of its own
    ((2, 17), (2, 3), ConvGeometry((1, 1), (1, 1), (0, 0), (2, 3))),  # more channels than a program has
    ((2, 2), (6, 6), ConvGeometry((3, 3), (2, 2), (0, 0), (3, 3))),  # "same": zeros after the image alone
    ((1, 2), (7, 4), ConvGeometry((3, 3), (2, 1), (0, 0), (3, 2))),  # strides that differ
    ((2, 2), (8, 5), ConvGeometry((2, 2), (3, 3), (0, 0), (3, 2))),  # rows under no tap
]
# convolution, activation, images
LAYERS: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    "stride 1": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), "none", (3, 4, 6, 7)),
    "stride 2": (lambda: nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3), "relu6", (4, 3, 7, 6)),
    "same": (lambda: Conv2dSame(2, 2, 5, stride=2, groups=2, bias=False), "relu", (4, 2, 6, 5)),
    "larger than the images": (lambda: nn.Conv2d(2, 2, (3, 5), padding=(1, 2), groups=2), "none", (3, 2, 2, 3)),
    "large": (lambda: nn.Conv2d(2, 2, 9, padding=4, groups=2, bias=False), "none", (2, 2, 6, 5)),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets: what it does is settled when it is first imported."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            process.submit(int).result()
        yield process


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_kernels_compute_what_torch_does(interpreter: ProcessPoolExecutor, number: int) -> None:
    interpreter.submit(check_kernels, number, torch.float32, 1e-5).result()


def test_kernels_take_float64(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_kernels, 4, torch.float64, 1e-13).result()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_trains_as_its_branches_do(interpreter: ProcessPoolExecutor, name: str) -> None:
    interpreter.submit(check_layer, name).result()


def test_nan_passes_through_an_activation(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_nan).result()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_gpu_trains_as_its_branches_do(name: str) -> None:
    forms, x = layer(name)
    expected = step(forms.separate, x)
    found = step(forms.as_one.float().to("cuda"), x.float().to("cuda"), expected["d y"].to("cuda"))
    assert max(errors({key: value.cpu() for key, value in found.items()}, expected).values()) <= 1e-4


@pytest.mark.parametrize(
    ("implementation", "form", "on_gpu"),
    [("auto", "depthwise", False), ("fused", "triton", True), ("triton", "triton", True), ("separate", None, False)],
)
def test_triton_must_be_asked_for(implementation: str, form: str | None, on_gpu: bool) -> None:
    convolution, _, (_, channels, *size) = LAYERS["stride 1"]
    model = nn.Sequential(convolution(), nn.BatchNorm2d(channels))
    layer = expand(model, torch.zeros(1, channels, *size), implementation=implementation).get_submodule("0")
    assert isinstance(layer, MultiBranchConv)
    assert layer.form == form
    with FakeTensorMode():
        for device, expected in (("cpu", form is not None), ("cuda", on_gpu), ("mps", False)):
            x = torch.empty(2, channels, *size, device=device)
            assert layer.form_for(x) == (form if expected else None), device


def test_triton_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["softshard.trainer.students.expand"], "find_spec", lambda package: None)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    with pytest.raises(RecipeError, match=r"student\.expand\.implementation: expected the package triton .* set auto"):
        expand(model, torch.zeros(1, 4, 6, 7), implementation="triton")
    expand(model, torch.zeros(1, 4, 6, 7))


@pytest.mark.parametrize("size", ["i32", 1])
@pytest.mark.parametrize("name", ["_products_kernel", "_forward_kernel", "_backward_kernel"])
def test_kernels_compile_for_gpus(name: str, size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts more than the compiler. Integers that are 1 become constants."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from softshard.trainer.students.fused import depthwise_triton

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    kernel = getattr(depthwise_triton, name)
    pointers = {"row_set": "*i32", "column_set": "*i32", "low": "fp32", "high": "fp32"}
    pointers |= dict.fromkeys(("left", "right", "shift", "result", "x", "dy", "kernel", "bias", "table"), "*fp32")
    blocks = {"KERNEL_HEIGHT": 3, "KERNEL_WIDTH": 3, "STRIDE_Y": 2, "STRIDE_X": 1, "IMAGES": 4, "PIXELS": 16}
    blocks |= {"CHANNELS": 16, "PARTNERS": 16, "COLUMNS": 16}
    constants = {key: value for key, value in blocks.items() if key in kernel.arg_names}
    if size == 1:
        constants |= dict.fromkeys((key for key in kernel.arg_names if key not in pointers | blocks), 1)
    types = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names}
    for capability in (75, 90):
        compiled = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]


@pytest.mark.parametrize("name", ["_products_kernel", "_forward_kernel", "_backward_kernel"])
def test_kernels_are_compiled_once_for_all_sizes(name: str) -> None:
    """Of integers only the channels may choose another compilation, by what divides them."""
    from softshard.trainer.students.fused import depthwise_triton

    parameters = getattr(depthwise_triton, name).params
    told_apart = {each.name for each in parameters if not each.is_constexpr and not each.do_not_specialize}
    arrays = {"left", "right", "shift", "x", "dy", "kernel", "bias", "table", "row_set", "column_set", "result"}
    assert told_apart - arrays - {"low", "high"} == {"channels"}


def check_kernels(number: int, dtype: torch.dtype, tolerance: float) -> None:
    from softshard.trainer.students.fused import depthwise_triton as kernels

    (count, channels), size, geometry = SHAPES[number]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    x = draw(count, channels, *size).to(dtype, memory_format=torch.channels_last)
    taps = geometry.kernel[0] * geometry.kernel[1]
    patches_of = functools.partial(patches, geometry=geometry, size=size)

    shift = draw(channels).to(dtype).double()
    p = patches_of(x.double()) - shift[:, None, None]
    gram, sums = kernels.gram(x, geometry, shift)
    assert_close(gram, torch.einsum("nctp,ncup->tuc", p, p), tolerance)
    assert_close(sums, p.sum((0, 3)).t(), tolerance)

    kernel, bias = draw(taps, channels), draw(channels)
    y = kernels.forward(x, geometry, kernel, bias, (0.0, 2.0))
    expected = torch.einsum("nctp,tc->ncp", patches_of(x.double()), kernel) + bias[:, None]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.flatten(2), expected.clamp(0.0, 2.0), tolerance)

    dy = torch.empty_like(y).copy_(draw(y.shape))
    before = (dy * ((y > 0) & (y < 2))).double().flatten(2)
    correlation, total = kernels.correlate(x, geometry, dy, y, (0.0, 2.0))
    assert_close(correlation, torch.einsum("ncp,nctp->tc", before, patches_of(x.double())), tolerance)
    assert_close(total, before.sum((0, 2)), tolerance)

    weight, q_factor, offset, means = draw(3, taps, channels), draw(3, channels), draw(taps, channels), draw(channels)
    exact = x.double().requires_grad_()
    p = patches_of(exact)
    of_patches = torch.einsum("tc,ncp->nctp", kernel, before - means[:, None]) + offset.t()[:, :, None]
    of_patches -= torch.einsum("rc,rtc,ruc,ncup->nctp", q_factor, weight, weight, p)
    (expected,) = torch.autograd.grad(p, exact, of_patches)
    found = kernels.backward(x, geometry, dy, y, (0.0, 2.0), kernel, weight, q_factor, offset, means)
    assert_close(found, expected, tolerance)


def patches(x: Tensor, geometry: ConvGeometry, size: tuple[int, int]) -> Tensor:
    """[N, C, T, H' W']: what lies under each output pixel."""
    after = [
        (geometry.output[axis] - 1) * geometry.stride[axis] + geometry.kernel[axis] - geometry.before[axis] - size[axis]
        for axis in (0, 1)
    ]
    padded = F.pad(x, (geometry.before[1], after[1], geometry.before[0], after[0]))
    columns = F.unfold(padded, geometry.kernel, stride=geometry.stride)
    return columns.unflatten(1, (x.shape[1], -1))


def layer(name: str) -> tuple[Forms, Tensor]:
    torch.manual_seed(0)
    conv, activation, shape = LAYERS[name]
    forms = both_forms(conv(), norm(shape[1], activation), implementation="fused")
    assert forms.as_one.form == "triton"
    return Forms(forms.as_one, forms.separate.double()), batch(*shape).float().double()


def check_layer(name: str) -> None:
    on_gpu = depthwise.kernels_for("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "kernels_for", lambda device: on_gpu)
        forms, x = layer(name)
        expected = step(forms.separate, x)
        found = step(forms.as_one.float(), x.float(), expected["d y"])
    assert max(errors(found, expected).values()) <= 1e-5


def check_nan() -> None:
    from softshard.trainer.students.fused import depthwise_triton as kernels

    x = torch.full((1, 1, 1, 1), torch.nan)
    geometry = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    assert kernels.forward(x, geometry, torch.ones(1, 1), torch.zeros(1), (0.0, 6.0)).isnan().all()
