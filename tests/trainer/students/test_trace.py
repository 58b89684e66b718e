"""Which pairs of a convolution and a batch norm are found, and that looking for them leaves no trace."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.small_students import MODELS, each_model, images, stock
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from torch import nn

from softshard.pipeline.runtime.errors import RecipeError
from softshard.trainer.students import build_student, expand
from softshard.trainer.students.trace import (
    NO_BATCH_NORM,
    NOT_RUN,
    OWN_ARITHMETIC,
    OWN_BRANCHES,
    READ_MORE_THAN_ONCE,
    SEVERAL_NAMES,
    find_pairs,
)


class Toy(nn.Module):
    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class SelfFolding(Toy):
    def switch_to_deploy(self):
        raise AssertionError("its own business")


def conv(channels=4, **changes):
    return nn.Conv2d(4, channels, **{"kernel_size": 3, "padding": 1, "groups": 4, **changes})


def bn(channels=4, **changes):
    return nn.BatchNorm2d(channels, **changes)


def tied():
    first, second = conv(), conv()
    second.weight = first.weight
    return {"conv": first, "second": second, "bn": bn(), "bn2": bn()}


def twice_named():
    only = conv()
    return {"conv": only, "alias": only, "bn": bn()}


def in_sequence(model, x):
    return model.bn(model.conv(x))


def keep_shape(model, x):
    y = model.conv(x)
    return model.bn(y).view(y.shape[0], -1, y.size(2), y.size(-1)) if y.ndim == y.dim() == 4 else y


PAIR = [("conv", "bn")]
TOYS = {
    "plain": (lambda: {"conv": conv(), "bn": bn()}, in_sequence, PAIR),
    "act": (lambda: {"conv": conv(), "bn": BatchNormAct2d(4)}, in_sequence, PAIR),
    "same padding": (lambda: {"conv": Conv2dSame(4, 4, 3, 2), "bn": bn()}, in_sequence, PAIR),
    "only the shape read": (lambda: {"conv": conv(), "bn": bn()}, keep_shape, PAIR),
    "identity between": (
        lambda: {"conv": conv(), "between": nn.Identity(), "bn": bn()},
        lambda m, x: m.bn(m.between(m.conv(x))),
        PAIR,
    ),
    "registered in another order": (
        lambda: {"conv": conv(8), "bn2": bn(4), "conv2": conv(4), "bn": bn(8)},
        lambda m, x: torch.cat([m.bn(m.conv(x)), m.bn2(m.conv2(x))], 1),
        [("conv", "bn"), ("conv2", "bn2")],
    ),
    "registered beside a stranger": (
        lambda: {"conv": conv(), "bn": bn(), "bn2": bn()},
        lambda m, x: m.bn2(m.conv(m.bn(x))),
        [("conv", "bn2")],
    ),
    "shared conv": (
        lambda: {"conv": conv(), "bn": bn(), "bn2": bn()},
        lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x)),
        READ_MORE_THAN_ONCE,
    ),
    "shared bn": (
        lambda: {"conv": conv(), "conv2": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)),
        READ_MORE_THAN_ONCE,
    ),
    "tied weights": (tied, lambda m, x: m.bn(m.conv(x)) + m.bn2(m.second(x)), READ_MORE_THAN_ONCE),
    "two names": (twice_named, in_sequence, SEVERAL_NAMES),
    "two bns": (
        lambda: {"conv": conv(), "bn": bn(), "bn2": bn()},
        lambda m, x: (lambda y: m.bn(y) + m.bn2(y))(m.conv(x)),
        READ_MORE_THAN_ONCE,
    ),
    "output read twice": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: (lambda y: m.bn(y) + y.sigmoid())(m.conv(x)),
        READ_MORE_THAN_ONCE,
    ),
    "output returned": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: (lambda y: {"a": [y], "b": m.bn(y)})(m.conv(x)),
        READ_MORE_THAN_ONCE,
    ),
    "weight read elsewhere": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1, groups=4),
        READ_MORE_THAN_ONCE,
    ),
    "no bn": (lambda: {"conv": conv()}, lambda m, x: m.conv(x), NO_BATCH_NORM),
    "something between": (lambda: {"conv": conv(), "bn": bn()}, lambda m, x: m.bn(m.conv(x).relu()), NO_BATCH_NORM),
    "dropout between": (
        lambda: {"conv": conv(), "drop": nn.Dropout(), "bn": bn()},
        lambda m, x: m.bn(m.drop(m.conv(x))),
        READ_MORE_THAN_ONCE,  # in evaluation mode dropout returns the very tensor, but reads it
    ),
    "subclass that does more": (lambda: {"conv": Doubled(4, 4, 1), "bn": bn()}, in_sequence, OWN_ARITHMETIC),
    "standardized weight": (lambda: {"conv": StdConv2d(4, 4, 3, padding=1), "bn": bn()}, in_sequence, OWN_ARITHMETIC),
    "parametrized weight": (
        lambda: {"conv": nn.utils.parametrizations.weight_norm(conv()), "bn": bn()},
        in_sequence,
        OWN_ARITHMETIC,
    ),
    "weight made by a hook": (
        lambda: {"conv": nn.utils.spectral_norm(conv()), "bn": bn()},
        in_sequence,
        OWN_ARITHMETIC,
    ),
    "reflecting padding": (lambda: {"conv": conv(padding_mode="reflect"), "bn": bn()}, in_sequence, OWN_ARITHMETIC),
    "no affine": (lambda: {"conv": conv(), "bn": bn(affine=False)}, in_sequence, NO_BATCH_NORM),
    "no statistics": (lambda: {"conv": conv(), "bn": bn(track_running_stats=False)}, in_sequence, NO_BATCH_NORM),
    "not run": (lambda: {"conv": conv(), "bn": bn()}, lambda m, x: m.bn(x), NOT_RUN),
    "own re-parameterization alone": (
        lambda: {"inner": SelfFolding(in_sequence, conv=conv(), bn=bn())},
        lambda m, x: m.inner(x),
        OWN_BRANCHES,
    ),
    "own re-parameterization": (
        lambda: {"inner": SelfFolding(in_sequence, conv=conv(), bn=bn()), "conv": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(m.inner(x))),
        PAIR,
    ),
}


@pytest.mark.parametrize("toy", TOYS)
def test_pairs_of_toys(toy):
    modules, run, expected = TOYS[toy]
    pairs, unpaired = find_pairs(Toy(run, **modules()), torch.randn(2, 4, 8, 8))
    if isinstance(expected, list):
        assert [(pair.conv, pair.bn) for pair in pairs] == expected
    else:
        assert not pairs
        assert {conv.reason for conv in unpaired} == {expected}


@each_model
def test_pairs_of_models(name):
    pairs, _ = find_pairs(stock(name), images(name, 1))
    assert Counter(pair.conv_type for pair in pairs) == MODELS[name][2]


@pytest.mark.parametrize("broken", [False, True])
def test_trace_leaves_no_trace(broken):
    def run(model, x):
        assert not model.training
        assert not torch.is_grad_enabled()
        y = model.bn2(model.conv2(model.bn(model.conv(x))))
        if broken:
            raise RuntimeError("no such size")
        return y

    model = Toy(run, conv=conv(), bn=bn(), conv2=conv(), bn2=bn()).train()
    model.get_submodule("bn").eval()  # a frozen batch norm
    modes, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    if broken:
        with pytest.raises(RecipeError, match=r"student\.expand: .*float32 \(1, 4, 8, 8\) on cpu.*no such size"):
            expand(model, torch.randn(1, 4, 8, 8))
    else:
        assert len(find_pairs(model, torch.randn(1, 4, 8, 8)).pairs) == 2
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert model.get_submodule("conv")(torch.ones(1, 4, 8, 8)).requires_grad


def test_every_convolution_is_in_a_pair_or_left_alone_for_a_reason():
    model = stock("ghostnetv2_100")
    pairs, unpaired = find_pairs(model, images("ghostnetv2_100", 1))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted([pair.conv for pair in pairs] + [conv.conv for conv in unpaired]) == sorted(names)
    assert {conv.reason for conv in unpaired} == {NO_BATCH_NORM}  # squeeze-and-excitation and the head
    again = find_pairs(expand(model, images("ghostnetv2_100", 1)), images("ghostnetv2_100", 1))
    assert [pair.conv_type for pair in again.pairs] == ["dense"]
    assert again.unpaired == unpaired


def test_a_transformer_has_nothing_to_expand():
    found = r"in VisionTransformer .*found: none; convolutions left alone: 1 without a batch norm .*embed\.proj"
    with pytest.raises(RecipeError, match=f"{found}.*set student.expand to null"):
        expand(build_student("vit_tiny_patch16_224", 10), torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_models_with_branches_of_their_own_are_left_alone(name):
    model = build_student(name, 10)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=r"found: none; .*: \d+ with a re-parameterization of their own \("):
        expand(model, torch.randn(1, 3, 64, 64))
    assert state.keys() == model.state_dict().keys()
