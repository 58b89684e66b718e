"""Fold changes nothing after the last step, whatever happened to the student in between."""

import copy
import io

import pytest
import torch
from helpers.small_students import (
    assert_folds_into_a_stock_model,
    difference,
    each_model,
    images,
    small,
    small_expanded,
    small_images,
    small_trained,
    stock,
    train,
    trained,
)
from helpers.small_weights import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from softshard.trainer.students import expand, fold
from softshard.trainer.students.branches import MultiBranchConv

pytestmark = pytest.mark.usefixtures("one_thread")


# Parity of whole models


def loaded_into_stock(folded, name):
    plain = stock(name).to(next(folded.parameters()).dtype)
    plain.load_state_dict(folded.state_dict(), strict=True)
    return plain.eval()


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
    wanted = {"branches": draw(st.integers(1, 3)), "scale_branch": draw(st.booleans()), "identity": draw(st.booleans())}
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
        torch.testing.assert_close(expanded.train(training)(x), plain.train(training)(x), rtol=0, atol=1e-12)
    assert (expanded[0].scale is not None) == (wanted["scale_branch"] and conv.kernel_size != (1, 1))
    assert expanded[0].identity is None or wanted["identity"]
    norms = [module for module in expanded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(bn.eps, bn.momentum)}
    folded = fold(randomise(expanded, seed=2))
    reference = expanded(x)
    torch.testing.assert_close(folded(x), reference, rtol=0, atol=1e-12 * max(reference.abs().max().item(), 1.0))
    assert repr(folded) == repr(plain)


# What happens to a model between expand and fold


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
    model = expand(small().double(), small_images()[:1], conv_types=["depthwise"], branches=2)
    expand(model, small_images()[:1], branches=4)
    counts = [len(module.conv_bns()) for module in model.modules() if isinstance(module, MultiBranchConv)]
    assert counts == [2, 4, 4]
    again = expand(fold(train(randomise(model), 1)), small_images()[:1])
    assert_folds_into_a_stock_model(train(again, 1))
