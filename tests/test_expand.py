"""Expand changes nothing before the first step, and every branch learns from then on."""

import copy

import pytest
import torch
from small_students import calibrate, each_model, grad, images, randomise, small, small_images, stock
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from pipeline.errors import RecipeError
from trainer.students import expand
from trainer.students.branches import MultiBranchConv
from trainer.students.fold import affine_of_sum

pytestmark = pytest.mark.usefixtures("one_thread")


@each_model
def test_expand_changes_nothing_before_the_first_step(name):
    """Bit for bit: branch 0 is computed by the same kernels as before, and the other branches add zeros."""
    x = images(name, 4)
    plain = calibrate(randomise(stock(name)), x)
    copied = copy.deepcopy(plain)
    kept = {
        **dict(copied.named_parameters()),
        **dict(copied.named_buffers()),
    }  # expand leaves these very tensors in branch 0
    expanded = expand(copied, x[:1])
    assert not any(module.training for module in expanded.modules())
    assert torch.equal(expanded(x), plain(x))
    outputs = []
    for model in (plain, expanded):
        torch.manual_seed(0)  # for dropout
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert all(torch.equal(buffer, kept[key]) for key, buffer in plain.named_buffers())
    assert all(torch.equal(grad(parameter), grad(kept[key])) for key, parameter in plain.named_parameters())


@each_model
def test_every_branch_learns(name):
    """At gamma 0 only the gammas of the new branches have gradients; these must differ between branches, or all would
    stay copies of one another."""
    x = images(name, 4)
    expanded = expand(calibrate(randomise(stock(name)), x), x[:1]).train()
    expanded(x).square().sum().backward()
    for module in expanded.modules():
        if isinstance(module, MultiBranchConv):
            _, second, third = (grad(branch.bn.weight) for branch in module.conv_bns())
            assert second.abs().max() > 0
            assert not torch.equal(second, third)


@pytest.mark.parametrize("conv_type", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 2, 2), (3, 0, 1), (1, 0, 1)])
def test_which_branches_there_are_and_where_they_lie(conv_type, stride, kernel, padding, dilation):
    conv = conv_type(4, 4, kernel, stride, padding, dilation, groups=4)
    expanded = MultiBranchConv(conv, nn.BatchNorm2d(4), branches=3, scale=True, identity=True)
    same_places = conv_type is Conv2dSame or 2 * padding == dilation * (kernel - 1)
    assert len(expanded.conv_bns()) == 3
    assert (expanded.scale is not None) == (kernel > 1)
    assert (expanded.identity is not None) == (stride == 1 and same_places)
    randomise(expanded)
    for branch in expanded.conv_bns():
        nn.init.zeros_(branch.bn.weight)
    kernel_of_others, _ = affine_of_sum(expanded)
    centre = kernel_of_others[:, :, kernel // 2, kernel // 2].clone()
    assert torch.equal(centre.abs().sum(), kernel_of_others.abs().sum())
    assert (centre != 0).all() == (kernel > 1 or expanded.identity is not None)


def test_no_identity_branch_between_different_channels():
    conv = nn.Conv2d(4, 8, 1)
    expanded = MultiBranchConv(conv, nn.BatchNorm2d(8), branches=1, scale=True, identity=True)
    assert expanded.identity is None


def test_pairs_that_gain_nothing_stay_plain():
    model = expand(small(), small_images().float()[:1], branches=1, scale=False)
    assert [name for name, module in model.named_modules() if isinstance(module, MultiBranchConv)] == ["4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": 0}, r"student\.expand\.branches: expected at least 1, found 0"),
        ({"kinds": ["dense"]}, r"student\.expand\.kinds: expected some of depthwise, pointwise, found 'dense'"),
        ({"kinds": []}, r"student\.expand\.kinds: expected a list .*, found \[\]"),
        ({"kinds": "depthwise"}, r"student\.expand\.kinds: expected a list .*, found 'depthwise'"),
        ({"branches": 1, "scale": False, "identity": False}, "found pairs: 1 dense, 1 depthwise, 2 pointwise"),
        ({"example_input": torch.randn(1, 4, 9, 9)}, r"takes, found torch.float32 \(1, 4, 9, 9\) on cpu.*RuntimeError"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message):
    model = small()
    with pytest.raises(RecipeError, match=message):
        expand(model, **{"example_input": torch.randn(1, 3, 17, 19), **arguments})
    assert repr(model) == repr(small())
