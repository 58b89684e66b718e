"""Expand changes nothing before the first step, and every branch learns from then on."""

import copy
import sys

import pytest
import torch
from helpers.small_students import ALL_CONV_TYPES, difference, each_model, expanded, images, small, small_images, stock
from helpers.small_weights import calibrate, grad, randomize
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from softshard.pipeline.runtime.errors import RecipeError
from softshard.trainer.students import expand
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fold import affine_of_sum

pytestmark = pytest.mark.usefixtures("one_thread")


@each_model
@pytest.mark.parametrize("implementation", ["separate", "auto"])
def test_expand_changes_nothing_before_the_first_step(name, implementation):
    """Separate branches bit for bit: branch 0 is computed by the same kernels as before, and the others add zeros.
    Through one convolution up to rounding, in training alone."""
    separate = implementation == "separate"
    dtype = torch.float32 if separate else torch.float64
    x = images(name, 4).to(dtype)
    plain = calibrate(randomize(stock(name)).to(dtype), x)
    copied = copy.deepcopy(plain)
    kept = dict(copied.named_parameters()) | dict(
        copied.named_buffers()
    )  # expand leaves these very tensors in branch 0
    model = expanded(copied, name, implementation)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), plain(x))
    outputs = []
    for each in (plain, model):
        torch.manual_seed(0)  # for dropout
        outputs.append(each.train()(x))
        outputs[-1].square().sum().backward()
    pairs = [tuple(outputs), *((kept[key], buffer) for key, buffer in plain.named_buffers())]
    pairs += [(grad(kept[key]), grad(parameter)) for key, parameter in plain.named_parameters()]
    for found, expected in pairs:
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if separate else 1e-9 * scale)


@each_model
def test_every_branch_learns(name):
    """At gamma 0 only the gammas of the new branches have gradients; these must differ between branches, or all would
    stay copies of one another."""
    model = expanded(calibrate(randomize(stock(name)), images(name, 4)), name).train()
    model(images(name, 4)).square().sum().backward()
    for module in model.modules():
        if isinstance(module, MultiBranchConv):
            _, second, third = (grad(branch.bn.weight) for branch in module.conv_bns())
            assert second.abs().max() > 0
            assert not torch.equal(second, third)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_split_gammas_change_nothing_before_the_first_step(branches):
    x = small_images()
    plain = calibrate(randomize(small().double()), x)
    plain.get_parameter("5.weight").data[:3] = 0  # as at the ends of residual blocks
    copied = copy.deepcopy(plain)
    model = expand(copied, x[:1], conv_types=ALL_CONV_TYPES, branches=branches, init="split_gamma")
    for training in (False, True, False):  # also with the statistics that a step in training leaves
        assert difference(model.train(training), plain.train(training), x) <= 1e-12
    model.train()(x).square().sum().backward()
    for module in model.modules():
        if isinstance(module, MultiBranchConv):
            gradients = [grad(branch.conv.weight) for branch in module.conv_bns()]
            assert all((gradients[0] - other).flatten(1).abs().amax(1).min() > 1e-9 for other in gradients[1:])


def test_expand_says_what_it_did_and_what_it_left_alone(caplog):
    name = "ghostnetv2_100"
    with caplog.at_level("INFO"):
        expanded(stock(name), name)
        expand(Shared(), torch.randn(1, 3, 8, 8))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if "trainer" in record.name]
    listing = "blocks.3.0.se.conv_reduce, blocks.3.0.se.conv_expand, blocks.4.0.se.conv_reduce and 12 more"
    assert lines == [
        (
            "INFO",
            "student.expand: convolutions with branches: 69 depthwise, 52 pointwise; left alone: "
            f"15 without a batch norm that can be folded ({listing})",
        ),
        (
            "WARNING",
            "student.expand: convolutions with branches: 1 pointwise; left alone: "
            "1 whose weight, output or batch norm is read more than once (twice)",
        ),
    ]


class Shared(nn.Module):
    """One pair, and a convolution that runs twice."""

    def __init__(self):
        super().__init__()
        self.once, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.bn2, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn3(self.twice(self.bn2(self.twice(self.bn(self.once(x))))))


@pytest.mark.parametrize("conv_type", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 2, 2), (3, 0, 1), (1, 0, 1)])
def test_which_branches_there_are_and_where_they_lie(conv_type, stride, kernel, padding, dilation):
    conv = conv_type(4, 4, kernel, stride, padding, dilation, groups=4)
    expanded = MultiBranchConv(conv, nn.BatchNorm2d(4), branches=3, scale_branch=True, identity=True)
    same_places = conv_type is Conv2dSame or 2 * padding == dilation * (kernel - 1)
    assert len(expanded.conv_bns()) == 3
    assert (expanded.scale is not None) == (kernel > 1)
    assert (expanded.identity is not None) == (stride == 1 and same_places)
    randomize(expanded)
    for branch in expanded.conv_bns():
        nn.init.zeros_(branch.bn.weight)
    kernel_of_others, _ = affine_of_sum(expanded)
    center = kernel_of_others[:, :, kernel // 2, kernel // 2].clone()
    assert torch.equal(center.abs().sum(), kernel_of_others.abs().sum())
    assert (center != 0).all() == (kernel > 1 or expanded.identity is not None)


def test_no_identity_branch_between_different_channels():
    conv = nn.Conv2d(4, 8, 1)
    expanded = MultiBranchConv(conv, nn.BatchNorm2d(8), branches=1, scale_branch=True, identity=True)
    assert expanded.identity is None


def test_pairs_that_gain_nothing_stay_plain():
    model = expand(small(), small_images().float()[:1], branches=1, scale_branch=False)
    assert [name for name, module in model.named_modules() if isinstance(module, MultiBranchConv)] == ["4"]


TYPES = "depthwise, pointwise, grouped, dense"
NOTHING = (
    "student.expand: expected convolution -> batch norm pairs of type {} in Sequential that gain from {}; found: "
    "1 dense, 1 depthwise, 2 pointwise; convolutions left alone: none; change conv_types or branches, or set "
    "student.expand to null"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": 0}, "student.expand.branches: expected at least 1, found 0"),
        (
            {"conv_types": ["depthwise", "dw"]},
            f"student.expand.conv_types: expected some of {TYPES}, found 'dw'",
        ),
        ({"conv_types": []}, f"student.expand.conv_types: expected a list with some of {TYPES}, found []"),
        (
            {"conv_types": "depthwise"},
            f"student.expand.conv_types: expected a list with some of {TYPES}, found 'depthwise'",
        ),
        ({"conv_types": ["grouped"]}, NOTHING.format("grouped", "branches=3, scale_branch=True, identity=True")),
        (
            {"branches": 1, "scale_branch": False, "identity": False},
            NOTHING.format("depthwise or pointwise", "branches=1, scale_branch=False, identity=False"),
        ),
        ({"init": "zero"}, "student.expand.init: expected one of zero_gamma, split_gamma, found 'zero'"),
        (
            {"implementation": "one"},
            "student.expand.implementation: expected one of auto, fused, separate, triton, found 'one'",
        ),
        (
            {"implementation": "triton"},
            "student.expand.implementation: expected the package triton for 'triton', found that it is not installed; "
            "pip install triton, or set auto",
        ),
        (
            {"implementation": "fused", "conv_types": ["dense", "pointwise"]},
            "student.expand.implementation: expected layers whose branches are one convolution for 'fused', found 0, "
            "which is neither pointwise without padding nor depthwise with as many outputs as inputs; set auto, or "
            "leave their type out of conv_types",
        ),
        (
            {"example_input": torch.randn(1, 4, 9, 9)},
            "student.expand: expected an example input that Sequential takes, found torch.float32 (1, 4, 9, 9) on cpu, "
            "for which it raises RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected input[1, 4, 9, 9] "
            "to have 3 channels, but got 4 channels instead",
        ),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message, monkeypatch):
    monkeypatch.setattr(
        sys.modules["softshard.trainer.students.expand"], "find_spec", lambda package: None
    )  # no Triton
    model = small()
    with pytest.raises(RecipeError) as error:
        expand(model, **{"example_input": torch.randn(1, 3, 17, 19), **arguments})
    assert str(error.value) == message
    assert repr(model) == repr(small())


@pytest.mark.parametrize(
    ("gpu", "needed"),
    [(False, "compiled kernels that run on this CPU"), (True, "the package triton on this machine")],
)
def test_fused_layers_need_kernels_of_this_machine(monkeypatch, gpu, needed):
    module = sys.modules["softshard.trainer.students.expand"]
    monkeypatch.setattr(module, "runs_here", lambda: False)
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = small()
    message = rf"expected layers whose branches are one convolution for 'fused', found 2, which needs {needed}; set"
    with pytest.raises(RecipeError, match=message):
        expand(model, torch.randn(1, 3, 17, 19), implementation="fused")
    assert repr(model) == repr(small())
    expand(model, torch.randn(1, 3, 17, 19), implementation="fused", conv_types=["pointwise"])
