"""Students: expand changes nothing before the first step, fold changes nothing after the last one."""

import copy
import functools
import io
import socket
from collections import Counter
from typing import Literal

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from timm.layers.std_conv import StdConv2d
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from pipeline.errors import RecipeError
from trainer.students import build_student, expand, fold
from trainer.students.branches import MultiBranchConv
from trainer.students.fold import affine_of_sum
from trainer.students.trace import find_pairs

# Odd sizes make stride 2 and "same" padding fall differently on the two sides.
MODELS: dict[str, tuple[Literal["timm", "torchvision"], int, dict[str, int]]] = {
    "mobilenetv2_100": ("timm", 64, {"depthwise": 17, "pointwise": 34, "dense": 1}),
    "mobilenetv3_large_100": ("timm", 65, {"depthwise": 15, "pointwise": 30, "dense": 1}),
    "ghostnetv2_100": ("timm", 64, {"depthwise": 69, "pointwise": 52, "dense": 1}),
    "tf_efficientnet_lite0": ("timm", 65, {"depthwise": 16, "pointwise": 32, "dense": 1}),
    "efficientnet_lite0": ("timm", 65, {"depthwise": 16, "pointwise": 32, "dense": 1}),
    "resnet18": ("timm", 65, {"pointwise": 3, "dense": 17}),
    "regnety_002": ("timm", 64, {"pointwise": 30, "grouped": 13, "dense": 1}),
    "fastvit_t8": ("timm", 64, {"depthwise": 10}),
    "mobilenet_v2": ("torchvision", 65, {"depthwise": 17, "pointwise": 34, "dense": 1}),
    "shufflenet_v2_x1_0": ("torchvision", 64, {"depthwise": 19, "pointwise": 36, "dense": 1}),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, which wait for each other for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grad(parameter):
    assert parameter.grad is not None
    return parameter.grad


def stock(name):
    return build_student(name, 10, library=MODELS[name][0])


def images(name, count, seed=0):
    size = MODELS[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def randomise(model, seed=1):
    """Weights, gammas, betas and statistics far from where they start, and nowhere zero."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1 + torch.rand(module.weight.shape, generator=draw))
            if module.bias is not None:
                module.bias.data = torch.randn(module.bias.shape, generator=draw).to(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            signs = 1 - 2.0 * torch.randint(2, module.weight.shape, generator=draw)
            module.weight.data = (signs * (0.5 + torch.rand(signs.shape, generator=draw))).to(module.weight)
            module.bias.data = (0.2 + torch.rand(signs.shape, generator=draw)).to(module.bias)
            mean, variance, _ = module.buffers()
            mean.copy_(torch.randn(signs.shape, generator=draw))
            variance.copy_(0.5 + torch.rand(signs.shape, generator=draw))
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale.gamma"):
            parameter.data.fill_(1.0)  # at its initial 1e-5 whole blocks would not matter
    return model


def calibrate(model, x):
    """Give every batch norm the statistics of these images, as training would; then evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@functools.cache
def trained(name):
    """An expanded model with weights and statistics as training might leave them (float64; copy before changing)."""
    torch.manual_seed(0)
    expanded = expand(stock(name), images(name, 1))
    return calibrate(randomise(expanded).double(), images(name, 8).double())


def loaded_into_stock(folded, name):
    plain = stock(name).to(next(folded.parameters()).dtype)
    plain.load_state_dict(folded.state_dict(), strict=True)
    return plain.eval()


@torch.no_grad()
def difference(a, b, x):
    """Largest difference of two models' outputs, relative to the largest output."""
    a, b = a(x), b(x)
    assert a.std(0).min() > 1e-3 * a.abs().max(), "outputs that do not depend on the images prove nothing"
    return ((a - b).abs().max() / a.abs().max()).item()


# Parity of whole models


@each_model
def test_folded_equals_expanded_and_loads_into_the_stock_model(name):
    expanded, x = trained(name), images(name, 4, seed=2).double()
    before = copy.deepcopy(expanded.state_dict())
    folded = fold(expanded)
    plain = loaded_into_stock(folded, name)
    assert difference(expanded, folded, x) <= 1e-12
    assert torch.equal(folded(x), plain(x))
    assert repr(folded) == repr(plain)  # types and settings of all modules
    assert all(torch.equal(value, before[key]) for key, value in expanded.state_dict().items())


@each_model
def test_folded_equals_expanded_in_float32(name):
    expanded = copy.deepcopy(trained(name)).float()
    assert difference(expanded, fold(expanded), images(name, 4, seed=2)) <= 1e-4


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


# Parity of single layers


@st.composite
def layers(draw):
    """(conv, bn, input, arguments of MultiBranchConv): all kinds, paddings, strides, dilations and sizes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels_in, channels_out, groups = draw(st.sampled_from([(6, 6, 6), (6, 12, 6), (6, 6, 2), (6, 6, 1), (6, 4, 1)]))
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
    steps = st.tuples(st.integers(1, 3), st.integers(1, 3))
    conv_type = draw(st.sampled_from([nn.Conv2d, Conv2dSame]))
    stride, dilation = draw(st.one_of(st.just((1, 1)), steps)), draw(st.one_of(st.just((1, 1)), steps))
    paddings = [st.just("valid"), st.tuples(st.integers(0, 3), st.integers(0, 3))]
    padding = draw(st.one_of(*paddings, *([st.just("same")] if stride == (1, 1) else [])))
    geometry = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    conv = conv_type(channels_in, channels_out, draw(sizes), bias=draw(st.booleans()), **geometry)
    bn = draw(st.sampled_from([nn.BatchNorm2d, BatchNormAct2d]))(
        channels_out, *draw(st.sampled_from([(1e-5, 0.1), (1e-3, None)]))
    )
    x = torch.randn(3, channels_in, draw(st.integers(13, 16)), draw(st.integers(13, 16)))
    wanted = {"branches": draw(st.integers(1, 3)), "scale": draw(st.booleans()), "identity": draw(st.booleans())}
    return conv, bn, x, wanted


def expanded_pair(conv, bn, **wanted):
    expanded = MultiBranchConv(conv, bn, **wanted)
    return nn.Sequential(expanded, expanded.plain.after)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@given(layers())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_layer_starts_equal_and_folds_exactly(layer):
    conv, bn, x, wanted = layer
    plain = randomise(nn.Sequential(conv, bn)).double()
    x = x.double()
    expanded = expanded_pair(*copy.deepcopy(plain), **wanted)
    for training in (True, False):
        assert torch.equal(expanded.train(training)(x), plain.train(training)(x))
    assert (expanded[0].scale is not None) == (wanted["scale"] and conv.kernel_size != (1, 1))
    assert expanded[0].identity is None or wanted["identity"]
    norms = [module for module in expanded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(bn.eps, bn.momentum)}
    folded = fold(randomise(expanded, seed=2))
    reference = expanded(x)
    torch.testing.assert_close(folded(x), reference, rtol=0, atol=1e-12 * max(reference.abs().max().item(), 1.0))
    assert repr(folded) == repr(plain)


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


# Which pairs are found


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
        [],
    ),
    "shared bn": (
        lambda: {"conv": conv(), "conv2": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)),
        [],
    ),
    "tied weights": (tied, lambda m, x: m.bn(m.conv(x)) + m.bn2(m.second(x)), []),
    "two names": (twice_named, in_sequence, []),
    "two bns": (
        lambda: {"conv": conv(), "bn": bn(), "bn2": bn()},
        lambda m, x: (lambda y: m.bn(y) + m.bn2(y))(m.conv(x)),
        [],
    ),
    "output read twice": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: (lambda y: m.bn(y) + y.sigmoid())(m.conv(x)),
        [],
    ),
    "output returned": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: (lambda y: {"a": [y], "b": m.bn(y)})(m.conv(x)),
        [],
    ),
    "weight read elsewhere": (
        lambda: {"conv": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1, groups=4),
        [],
    ),
    "no bn": (lambda: {"conv": conv()}, lambda m, x: m.conv(x), []),
    "something between": (lambda: {"conv": conv(), "bn": bn()}, lambda m, x: m.bn(m.conv(x).relu()), []),
    "dropout between": (
        lambda: {"conv": conv(), "drop": nn.Dropout(), "bn": bn()},
        lambda m, x: m.bn(m.drop(m.conv(x))),
        [],
    ),
    "subclass that does more": (lambda: {"conv": Doubled(4, 4, 1), "bn": bn()}, in_sequence, []),
    "standardised weight": (lambda: {"conv": StdConv2d(4, 4, 3, padding=1), "bn": bn()}, in_sequence, []),
    "parametrised weight": (
        lambda: {"conv": nn.utils.parametrizations.weight_norm(conv()), "bn": bn()},
        in_sequence,
        [],
    ),
    "weight made by a hook": (lambda: {"conv": nn.utils.spectral_norm(conv()), "bn": bn()}, in_sequence, []),
    "reflecting padding": (lambda: {"conv": conv(padding_mode="reflect"), "bn": bn()}, in_sequence, []),
    "no affine": (lambda: {"conv": conv(), "bn": bn(affine=False)}, in_sequence, []),
    "no statistics": (lambda: {"conv": conv(), "bn": bn(track_running_stats=False)}, in_sequence, []),
    "own re-parameterisation": (
        lambda: {"inner": SelfFolding(in_sequence, conv=conv(), bn=bn()), "conv": conv(), "bn": bn()},
        lambda m, x: m.bn(m.conv(m.inner(x))),
        PAIR,
    ),
}


@pytest.mark.parametrize("toy", TOYS)
def test_pairs_of_toys(toy):
    modules, run, expected = TOYS[toy]
    pairs = find_pairs(Toy(run, **modules()), torch.randn(2, 4, 8, 8))
    assert [(pair.conv, pair.bn) for pair in pairs] == expected


@each_model
def test_pairs_of_models(name):
    pairs = find_pairs(stock(name), images(name, 1))
    assert Counter(pair.kind for pair in pairs) == MODELS[name][2]


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
        assert len(find_pairs(model, torch.randn(1, 4, 8, 8))) == 2
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert model.get_submodule("conv")(torch.ones(1, 4, 8, 8)).requires_grad


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_models_with_branches_of_their_own_are_left_alone(name):
    model = build_student(name, 10)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match="found pairs: none"):
        expand(model, torch.randn(1, 3, 64, 64))
    assert state.keys() == model.state_dict().keys()


# What happens to a model between expand and fold


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        Conv2dSame(8, 8, 5, stride=2, groups=8, bias=True),
        BatchNormAct2d(8, act_layer=nn.PReLU, eps=1e-3),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.BatchNorm2d(8, momentum=0.05),
        nn.Conv2d(8, 16, 1, bias=True),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def small_images(seed=3):
    return torch.randn(16, 3, 17, 19, generator=torch.Generator().manual_seed(seed)).double()


def small_expanded(seed=0):
    return expand(small(seed).double(), small_images()[:1])


def train(model, steps):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        (model(small_images(seed)) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def small_trained():
    return train(randomise(small_expanded()), 3)


def assert_folds_into_a_stock_model(expanded):
    plain = small(seed=9).double().eval()
    plain.load_state_dict(fold(expanded).state_dict(), strict=True)
    assert difference(expanded, plain, small_images()) <= 1e-12


def reloaded(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small_expanded(seed=5).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(train(model, 1))
    return ema.module


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, reloaded, pickled, averaged, nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm],
)
def test_fold_after(change):
    model = small_trained()
    outputs = model(small_images())
    changed = change(model)
    assert_folds_into_a_stock_model(changed)
    if change is not averaged:
        assert torch.equal(changed(small_images()), outputs)


def test_fold_after_training_from_the_start():
    """Gammas start at 0, so this also needs gradients to reach them; both models see the same images."""
    plain, expanded = small().double(), small_expanded()
    train(plain, 4)
    train(expanded, 4)
    assert difference(plain, expanded, small_images()) > 1e-3
    assert_folds_into_a_stock_model(expanded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fold_rounds_only_its_result(dtype):
    model = small_trained().to(dtype)
    folded, exact = fold(model).state_dict(), fold(copy.deepcopy(model).double()).state_dict()
    for key, value in folded.items():
        assert value.dtype == (torch.int64 if key.endswith("tracked") else dtype)
        assert torch.equal(value, exact[key].to(value.dtype))


def test_templates_hold_no_weights_and_are_not_in_the_state():
    model, plain = small_expanded(), small()
    templates = [module.plain for module in model.modules() if isinstance(module, MultiBranchConv)]
    tensors = [tensor for pair in templates for part in (pair.conv, pair.bn) for tensor in part.state_dict().values()]
    assert len(templates) == 3
    assert all(tensor.is_meta for tensor in tensors)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert not {id(tensor) for tensor in tensors} & {id(parameter) for parameter in model.parameters()}
    assert sum("bn.weight" in key or "identity.weight" in key for key in model.state_dict()) == 3 * 3 + 1 + 1
    assert len(model.state_dict()) > len(plain.state_dict())


def test_folded_model_keeps_modes_and_shares_nothing():
    model = small_trained().train()
    model.get_submodule("4").eval()  # the batch norms that were "5"
    folded = fold(model)
    assert folded.training
    assert folded.get_submodule("2").training
    assert folded.state_dict()["5.num_batches_tracked"] == 3
    assert not folded.get_submodule("5").training
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in folded.parameters())


def test_fold_of_a_plain_model_is_an_equal_copy():
    model = small()
    folded = fold(model)
    assert folded is not model
    assert repr(folded) == repr(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in folded.state_dict().items())


def test_fold_inside_a_wrapper_and_of_a_part():
    model = small_trained()
    assert difference(nn.Sequential(model), fold(nn.Sequential(model)), small_images()) <= 1e-12
    with pytest.raises(ValueError, match="fold the whole student"):
        fold(nn.Sequential(model.get_submodule("2")))


def test_expand_in_two_goes_and_again_after_fold():
    model = expand(small().double(), small_images()[:1], kinds=["depthwise"], branches=2)
    expand(model, small_images()[:1], branches=4)
    counts = [len(module.conv_bns()) for module in model.modules() if isinstance(module, MultiBranchConv)]
    assert counts == [2, 4, 4]
    again = expand(fold(train(randomise(model), 1)), small_images()[:1])
    assert_folds_into_a_stock_model(train(again, 1))


# Arguments


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


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18.a1_in1k"), ("torchvision", "mobilenet_v2")])
def test_build_student(offline, library, name):
    model = build_student(name, 7, library=library)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mobilnetv2_100", 10), r"student\.model: no timm model is called 'mobilnetv2_100' \(near: mobilenetv2_100, "),
        (("resnet18.a1_in2k", 10), r"no timm model is called 'resnet18.a1_in2k' \(near: resnet18.a1_in1k, "),
        (("hf-hub:timm/resnet18.a1_in1k", 10), "no timm model is called 'hf-hub:"),
        (("qqqqqqqq", 10), r"no timm model is called 'qqqqqqqq'; timm\.list_models\(\) lists them"),
        (("mobilenetv2", 10, "torchvision"), r"no torchvision model is called 'mobilenetv2' \(near: mobilenet_v2, "),
        (("fasterrcnn_resnet50_fpn", 10, "torchvision"), "no torchvision model is called"),
        (("resnet18", 10, "keras"), r"student\.library: expected one of timm, torchvision, found 'keras'"),
        (("resnet18", 0), r"student\.num_classes: expected at least 1 class, found 0"),
    ],
)
def test_build_student_says_what_is_wrong(offline, arguments, message):
    model, num_classes, *library = arguments
    with pytest.raises(RecipeError, match=message):
        build_student(model, num_classes, **({"library": library[0]} if library else {}))


def test_pretrained_weights_that_are_not_there(monkeypatch):
    with pytest.raises(RecipeError, match=r"student\.pretrained: timm has no weights for 'ghostnet_130'"):
        build_student("ghostnet_130", 10, pretrained=True)

    def no_route(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_route)
    with pytest.raises(RecipeError, match=r"student\.pretrained: .*'resnet18'.*no route to host"):
        build_student("resnet18", 10, pretrained=True)


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_pretrained_torchvision_student_keeps_all_but_a_classifier_of_another_size(monkeypatch, num_classes):
    published = torchvision.models.get_model("mobilenet_v2", weights=None)
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights, **kw: published if weights else get_model(name, **kw)
    )
    state = build_student("mobilenet_v2", num_classes, library="torchvision", pretrained=True).state_dict()
    same = {key for key, value in published.state_dict().items() if torch.equal(state[key], value)}
    fresh = set() if num_classes == 1000 else {"classifier.1.weight", "classifier.1.bias"}
    assert same == state.keys() - fresh
