"""All branches of a depthwise convolution through one convolution: what separate branches compute."""

import copy
import math

import pytest
import torch
from helpers.small_branches import (
    ACTIVATIONS,
    Forms,
    batch,
    both_forms,
    difference,
    errors_in_float32,
    errors_of_step,
    norm,
    rounded,
    step,
    to,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from softshard.trainer.students.fused.conv_geometry import ConvGeometry
from softshard.trainer.students.fused.depthwise import DepthwiseBranches

pytestmark = pytest.mark.usefixtures("one_thread")

# Kernel, stride, padding ("timm": that of a Conv2dSame): what students have, and what the kernels could get wrong.
GEOMETRIES = [
    (3, 1, 1),
    (3, 2, 1),
    (3, 2, 0),
    (5, 1, 2),
    (5, 2, 2),
    (7, 1, 3),
    (7, 2, 3),
    ((1, 5), 1, (0, 2)),
    ((5, 1), 1, (2, 0)),
    ((2, 4), 1, (1, 2)),
    ((2, 4), 2, (0, 3)),
    ((2, 3), (3, 2), (2, 3)),  # paddings as large as the kernel, or nearly
    (3, (1, 2), (3, 0)),
    (3, 1, 3),
    (3, 2, "timm"),
    (5, 2, "timm"),
    (4, 1, "same"),
    (1, 1, 0),
    (1, 2, 3),
]
each_geometry = pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)


def convolution(channels, kernel, stride, padding, bias):
    if padding == "timm":
        return Conv2dSame(channels, channels, kernel, stride, groups=channels, bias=bias)
    return nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=bias)


def layer(channels, kernel, stride=1, padding=0, *, bias=False, activation="none", seed=1, **wanted) -> Forms:
    torch.manual_seed(seed)
    conv = convolution(channels, kernel, stride, padding, bias)
    forms = both_forms(conv, norm(channels, activation), seed=seed, **wanted)
    assert forms.as_one.form == "depthwise"
    assert (forms.as_one.act is None) == (activation == "none")
    return to(forms, torch.float64)


def fits(forms: Forms, height: int, width: int) -> bool:
    """Whether any output is left."""
    conv = forms.separate.plain.conv
    if isinstance(conv, Conv2dSame) or conv.padding == "same":
        return True
    sizes = zip((height, width), conv.padding, conv.kernel_size, strict=True)
    return all(size + 2 * int(padding) >= kernel for size, padding, kernel in sizes)


# Every size


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@each_geometry
def test_every_height_and_width(kernel, stride, padding):
    """In float64 up to 1e-10 of the layer's largest gradient: in images of a few pixels some vanish, and rounding
    weighs more where a small weight is the only one that sees more than padding. 5 channels are a vector and a rest in
    float64, and less than a vector in float32."""
    number = GEOMETRIES.index((kernel, stride, padding))
    forms = layer(5, kernel, stride, padding, bias=number % 2 == 0, branches=1 + number % 4)
    in_float32 = rounded(forms, torch.float32)
    for size in range(1, 41):
        other = 1 + 7 * size % 40
        for height, width in ((size, other), (other, size)):
            if not fits(forms, height, width):
                continue
            found = errors_of_step(forms, in_float32, batch(3, 5, height, width, seed=size), of_layer=True)
            assert found.exact <= 1e-10, (height, width, found)
            assert found.as_one <= max(1e-5, 2 * found.separate), (height, width, found)


@pytest.mark.parametrize("channels", [1, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 2), ((2, 4), (1, 2), (1, 0))])
def test_channels_that_are_no_multiple_of_a_vector(channels, kernel, stride, padding):
    forms = layer(channels, kernel, stride, padding, bias=True)
    x = batch(4, channels, 11, 9)
    assert difference(forms, x) <= 1e-11
    found = errors_in_float32(forms, x, of_layer=True)
    assert found.as_one <= max(1e-5, 2 * found.separate), found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 70, 70), (2, 3, 130, 20), (2, 3, 3, 700), (1, 2, 2100, 2), (700, 3, 2, 2)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 2), (3, 2, "timm"), ((2, 3), (3, 1), 1)])
def test_planes_and_batches_of_several_tiles(activation, shape, kernel, stride, padding):
    """A tile has a thousand or two of pixels: some rows of an image, or some images."""
    forms = layer(shape[1], kernel, stride, padding, activation=activation)
    found = errors_in_float32(forms, batch(*shape), of_layer=True)
    assert found.exact <= 1e-11, found
    assert found.as_one <= max(1e-5, 2 * found.separate), found


@st.composite
def layers(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.integers(2, 20))
    stride = draw(st.one_of(st.just(1), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    paddings = [st.just("timm"), st.just("valid"), st.tuples(st.integers(0, 8), st.integers(0, 8))]
    forms = layer(
        channels,
        draw(st.tuples(st.integers(1, 7), st.integers(1, 7))),
        stride,
        draw(st.one_of(*paddings, *([st.just("same")] if stride == 1 else []))),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        branches=draw(st.integers(1, 4)),
        scale_branch=draw(st.booleans()),
        identity=draw(st.booleans()),
    )
    height, width = (draw(st.integers(size, size + 40)) for size in forms.separate.plain.conv.kernel_size)
    return forms, batch(draw(st.integers(3, 5)), channels, height, width)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@given(layers())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_layer(drawn):
    forms, x = drawn
    assert difference(forms, x, of_layer=True) <= 1e-11


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize(("scale", "identity"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_branches(branches, scale, identity, bias):
    forms = layer(6, 3, padding=1, branches=branches, scale_branch=scale, identity=identity, bias=bias)
    assert len(forms.as_one.norms()) == branches + scale + identity
    assert difference(forms, batch(4, 6, 9, 10)) <= 1e-11


# Numbers


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (5, 2), (7, 3)])
@pytest.mark.parametrize("size", [1, 2, 4, 14])
def test_float32_is_as_exact_as_separate_branches(kernel, padding, size):
    """Also where the mean is 50 deviations, and where most of what a kernel sees is padding."""
    for mean, least in ((0, 1e-5), (1, 1e-5), (5, 2e-5), (50, 4e-4)):
        forms = layer(8, kernel, padding=padding)
        found = errors_in_float32(forms, batch(64, 8, size, size, mean=mean), of_layer=True)
        assert found.as_one <= max(least, 2 * found.separate), (mean, found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_spreads_over_its_channel_and_no_further(activation, dtype):
    forms = to(layer(6, 3, padding=1, activation=activation), dtype)
    x = batch(3, 6, 8, 9).to(dtype)
    x[1, 2, 3, 4] = math.nan
    for form in forms:
        y = form(x)
        assert y[:, 2].isnan().all()
        assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("limits", [None, (0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)])
@pytest.mark.parametrize(
    "geometry", [ConvGeometry((3, 2), (2, 1), (1, 0), (3, 3)), ConvGeometry((1, 3), (1, 2), (1, 4), (6, 5))]
)
def test_gradients_are_those_of_finite_differences(limits, geometry):
    taps = geometry.kernel[0] * geometry.kernel[1]
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 4), (2, taps, 3), (2, 3), (3,))
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]

    def output(*tensors):
        return DepthwiseBranches.apply(*tensors, geometry, limits, 1e-3, None)[0]  # pyright: ignore

    y = output(*tensors)
    for limit in limits or ():
        assert (y[y != limit] - limit).abs().min() > 1e-4, "finite differences must not cross a limit"
    assert torch.autograd.gradcheck(output, tensors)


# Threads and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    """Threads share channels, never a sum. Rows long enough that torch would share out their mean, too."""
    forms = to(layer(97, 3, padding=1, activation="relu6"), dtype)
    x = batch(8, 97, 9, 80).to(dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(step(copy.deepcopy(forms.as_one), x))
    torch.set_num_threads(1)
    for other in found[1:]:
        for key, value in other.items():
            assert torch.equal(value, found[0][key]), key


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_memory_format_gives_the_same(activation):
    """NCHW, channels last, and neither: a slice, a transposition, an expanded image and gradient."""
    forms = layer(5, 3, stride=2, padding=1, activation=activation)
    x = batch(3, 5, 9, 9)
    dy = step(forms.separate, x)["d y"].contiguous(memory_format=torch.channels_last)
    big = torch.zeros(3, 10, 9, 18, dtype=torch.float64)
    big[:, ::2, :, ::2] = x
    for other in (x.contiguous(), big[:, ::2, :, ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        for gradient in (dy, dy.contiguous(), dy.transpose(2, 3).contiguous().transpose(2, 3)):
            one, same = (step(forms.separate, x, dy), step(forms.as_one, other, gradient))
            torch.testing.assert_close(same["y"], one["y"], rtol=0, atol=1e-12)
            torch.testing.assert_close(same["d x"], one["d x"], rtol=0, atol=1e-12)
    outputs = [form(batch(1, 5, 9, 9).expand(3, -1, -1, -1)) for form in forms]
    for y in outputs:
        y.sum().backward()  # of stride 0
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
