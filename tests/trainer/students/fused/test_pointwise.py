"""All branches of a pointwise convolution through one convolution, in either form: what separate branches compute."""

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
    norm,
    rounded,
    step,
    to,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from softshard.trainer.students import expand
from softshard.trainer.students.fused.pointwise import PointwiseBranches

pytestmark = pytest.mark.usefixtures("one_thread")

# Inputs and outputs with two branches: as many (with an identity branch), expanding, and contracting by much.
SHAPES = {"identity": (6, 6), "closed": (5, 17), "stacked": (40, 7)}
FORMS = {"identity": "closed", "closed": "closed", "stacked": "stacked"}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def layer(channels, outputs, stride=1, *, padding=0, bias=False, activation="none", kind=nn.Conv2d, seed=1, **wanted):
    torch.manual_seed(seed)
    conv = kind(channels, outputs, 1, stride, padding, bias=bias)
    return to(both_forms(conv, norm(outputs, activation), seed=seed, **wanted), torch.float64)


def shaped(shape, **wanted) -> Forms:
    forms = layer(*SHAPES[shape], **wanted)
    assert forms.as_one.form == FORMS[shape]
    assert (forms.as_one.identity is not None) == (shape == "identity")
    return forms


@each_shape
@each_activation
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 9, 7), (2, 1, 1), (1, 1, 3), (3, 2, 2), (1, 70, 71), (130, 4, 4)])
def test_any_batch(shape, activation, bias, size):
    """Also one of fewer pixels than channels, whose covariance is singular: then some gradients vanish."""
    forms = shaped(shape, activation=activation, bias=bias)
    count, height, width = size
    x = batch(count, SHAPES[shape][0], height, width)
    assert difference(forms, x, of_layer=count * height * width < 20) <= 1e-11


@each_shape
@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_strides(shape, stride, kind):
    forms = layer(*SHAPES[shape], stride, kind=kind)
    assert forms.as_one.form is not None
    assert difference(forms, batch(4, SHAPES[shape][0], 9, 8)) <= 1e-11


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@pytest.mark.parametrize(("channels", "outputs"), [(8, 8), (8, 20), (40, 5)])
@each_activation
def test_any_branches(branches, channels, outputs, activation):
    for identity in (True, False):
        forms = layer(channels, outputs, branches=branches, identity=identity, activation=activation)
        count = len(forms.as_one.norms())
        assert count == branches + (identity and channels == outputs)
        assert (forms.as_one.form is None) == (count == 1)
        assert difference(forms, batch(4, channels, 7, 5), of_layer=True) <= 1e-11


@st.composite
def layers(draw):
    channels = draw(st.integers(1, 40))
    forms = layer(
        channels,
        draw(st.one_of(st.just(channels), st.integers(1, 40))),
        draw(st.one_of(st.just(1), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
        padding=draw(st.sampled_from([0, "valid"])),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        kind=draw(st.sampled_from([nn.Conv2d, Conv2dSame])),
        seed=draw(st.integers(0, 2**16)),
        branches=draw(st.integers(1, 4)),
        identity=draw(st.booleans()),
    )
    return forms, batch(draw(st.integers(3, 6)), channels, draw(st.integers(2, 9)), draw(st.integers(2, 9)))


@given(layers())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_layer(drawn):
    forms, x = drawn
    assert (forms.as_one.form is None) == (len(forms.as_one.norms()) == 1)
    assert difference(forms, x, of_layer=True) <= 1e-10  # beside a small variance, rounding weighs more


# Numbers


@each_shape
@pytest.mark.parametrize("size", [1, 2, 7, 14])
def test_float32_is_as_exact_as_separate_branches(shape, size):
    """Also where the mean is 50 deviations."""
    for mean, least in ((0, 1e-5), (1, 1e-5), (5, 2e-5), (50, 2e-4)):
        forms = shaped(shape)
        found = errors_in_float32(forms, batch(64, SHAPES[shape][0], size, size, mean=mean), of_layer=True)
        assert found.as_one <= max(least, 2 * found.separate), (mean, found)


@each_shape
@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_spreads_over_all(shape, activation, dtype):
    """Every output channel sees every input channel."""
    x = batch(3, SHAPES[shape][0], 8, 9).to(dtype)
    x[1, 2, 3, 4] = math.nan
    for form in to(shaped(shape, activation=activation), dtype):
        if form.identity is None:
            assert form(x).isnan().all()
        else:
            assert form(x)[:, 2].isnan().all()


@pytest.mark.parametrize("limits", [None, (0.0, math.inf), (0.0, 6.0), (-0.5, 0.5)])
def test_gradients_are_those_of_finite_differences(limits):
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 2, 3), (2, 4, 3), (2, 4), (4,))
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]

    def output(*tensors):
        return PointwiseBranches.apply(*tensors, limits, 1e-3, None)[0]  # pyright: ignore

    y = output(*tensors)
    for limit in limits or ():
        assert (y[y != limit] - limit).abs().min() > 1e-4, "finite differences must not cross a limit"
    assert torch.autograd.gradcheck(output, tensors)


@each_shape
@each_activation
def test_any_memory_format_gives_the_same(shape, activation):
    """NCHW, channels last, and neither: a transposition, an expanded image and gradient."""
    forms = shaped(shape, activation=activation)
    x = batch(3, SHAPES[shape][0], 6, 6)
    expected = step(forms.separate, x)
    dy = expected["d y"]
    for other in (x.contiguous(), x, x.transpose(2, 3).contiguous().transpose(2, 3)):
        for gradient in (dy.contiguous(), dy.contiguous(memory_format=torch.channels_last), dy.mT.contiguous().mT):
            found = step(forms.as_one, other, gradient)
            for key in ("y", "d x"):
                torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-12)
    outputs = [form(x[:1].expand(3, -1, -1, -1)) for form in forms]
    for y in outputs:
        y.sum().backward()  # of stride 0
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@each_shape
def test_models_in_bfloat16(shape):
    """A model of which all is in bfloat16: about as exact as separate branches, which round each output."""
    forms = to(to(shaped(shape), torch.bfloat16), torch.float64)
    x = batch(16, SHAPES[shape][0], 9, 9).bfloat16().double()
    expected = step(forms.separate, x)
    in_bfloat16 = rounded(forms, torch.bfloat16)
    for form in in_bfloat16:
        found = step(form, x.bfloat16(), expected["d y"])
        assert found["y"].dtype == torch.bfloat16
        assert (found["y"].double() - expected["y"]).abs().max() <= 0.04 * expected["y"].abs().max()  # 8 bits
        assert (found["d x"].double() - expected["d x"]).abs().max() <= 0.04 * expected["d x"].abs().max()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_compiler_takes_a_layer_as_a_whole(pooled):
    """Behind it a gradient may lie in another way than the activation's output does."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), norm(16, "relu6"), nn.AdaptiveAvgPool2d(1 if pooled else 5))
    model = expand(plain, torch.zeros(1, 8, 5, 5)).to(memory_format=torch.channels_last)
    x = batch(3, 8, 5, 5).float().requires_grad_()
    gradients = []
    for form in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        (gradient,) = torch.autograd.grad(form(x).square().sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
