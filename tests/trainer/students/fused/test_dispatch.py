"""Which layers train as one convolution and when; whole models, and what wraps them, as with separate branches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_branches import Forms, batch, both_forms, difference, errors, norm, rounded, step, to
from helpers.small_students import MODELS, images, stock
from helpers.small_weights import grad, randomize
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from softshard.trainer.students import expand, fold
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fused.dispatch import form_of, why_not_fused

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [
    "mobilenetv2_100",
    "ghostnetv2_100",
    "shufflenet_v2_x1_0",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
]


# Layers: one of each form


LAYERS: dict[str, Callable[..., Any]] = {
    "depthwise": lambda **settings: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=True, **settings),
    "closed": lambda **settings: nn.Conv2d(8, 8, 1, bias=True, **settings),
    "stacked": lambda **settings: nn.Conv2d(32, 6, 1, bias=True, **settings),
}
each_form = pytest.mark.parametrize("form", LAYERS)


def layer(form, **of_norm) -> Forms:
    torch.manual_seed(0)
    conv = LAYERS[form]()
    forms = both_forms(conv, nn.BatchNorm2d(conv.out_channels, **of_norm), branches=3)
    assert forms.as_one.form == form
    return to(forms, torch.float64)


def some(form, count=4, seed=0) -> Tensor:
    return batch(count, 32 if form == "stacked" else 8, 6, 7, seed=seed)


def assert_same(found, expected, tolerance=1e-11):
    assert max(errors(found, expected).values()) <= tolerance


@pytest.mark.parametrize(
    ("conv", "branches", "identity", "form"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 3, True, "depthwise"),
        (nn.Conv2d(8, 8, (1, 7), 2, groups=8), 1, False, "depthwise"),
        (Conv2dSame(8, 8, 5, 2, groups=8), 3, False, "depthwise"),
        (nn.Conv2d(8, 8, 9, groups=8), 3, False, None),  # large
        (nn.Conv2d(8, 8, 3, dilation=2, groups=8), 3, False, None),
        (nn.Conv2d(8, 16, 3, groups=8), 3, False, None),
        (nn.Conv2d(8, 8, 3, groups=4), 3, False, None),
        (nn.Conv2d(8, 8, 3), 3, False, None),
        (nn.Conv2d(8, 8, 1), 3, True, "closed"),
        (nn.Conv2d(8, 24, 1, 2, padding="valid"), 3, False, "closed"),
        (nn.Conv2d(96, 16, 1), 3, False, "stacked"),
        (nn.Conv2d(96, 16, 1), 1, False, None),  # nothing to sum
        (nn.Conv2d(96, 96, 1), 1, True, "closed"),
        (nn.Conv2d(8, 8, 1, padding=1), 3, False, None),  # its statistics count pixels of padding
    ],
)
def test_the_form_of_a_layer(conv, branches, identity, form):
    assert form_of(conv, branches, identity) == form


@pytest.mark.parametrize(
    ("conv", "form", "why"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "triton", ""),
        (nn.Conv2d(8, 8, (1, 9), groups=8), "triton", ""),  # where auto has separate branches
        (nn.Conv2d(8, 8, 13, groups=8), "triton", ""),
        (nn.Conv2d(1, 1, 3), "triton", ""),
        (nn.Conv2d(8, 8, 1), "closed", ""),
        (nn.Conv2d(96, 16, 1), "stacked", ""),
        (nn.Conv2d(8, 8, 15, groups=8), None, "has a kernel of more than 13 pixels"),
        (nn.Conv2d(8, 8, 3, dilation=2, groups=8), None, "has a dilated kernel"),
        (
            nn.Conv2d(8, 16, 3, groups=8),
            None,
            "is neither pointwise without padding nor depthwise with as many outputs",
        ),
        (
            nn.Conv2d(8, 8, 1, padding=1),
            None,
            "is neither pointwise without padding nor depthwise with as many outputs",
        ),
    ],
)
def test_the_form_of_a_layer_that_must_be_fused(conv, form, why):
    assert form_of(conv, 3, False, "fused") == form
    assert why_not_fused(conv).startswith(why)
    assert bool(why_not_fused(conv)) == (form is None)


@pytest.mark.parametrize("size", [(15, 14), (6, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [((9, 9), 1), ((9, 9), 2), ((11, 11), 2), ((13, 13), 1), ((3, 13), 1)])
def test_large_kernels_that_must_be_fused(kernel, stride, size):
    rows, columns = kernel
    conv = nn.Conv2d(6, 6, (rows, columns), stride, (rows // 2, columns // 2), groups=6)
    forms = to(both_forms(conv, nn.BatchNorm2d(6), implementation="fused"), torch.float64)
    x = batch(3, 6, *size)
    assert forms.as_one.form_for(x) == "triton"
    assert difference(forms, x, of_layer=True) <= 1e-12


@each_form
def test_checkpoints_fold_and_names_do_not_depend_on_the_form(form):
    """After a step each form loads into the other, and both fold into the same."""
    forms = layer(form)
    dy = [step(each, some(form))["d y"] for each in forms][-1]
    states = [each.state_dict() for each in forms]
    assert [(key, value.shape, value.dtype) for key, value in states[0].items()] == [
        (key, value.shape, value.dtype) for key, value in states[1].items()
    ]
    folded = [fold(nn.Sequential(each, each.plain.after)).eval()(some(form, seed=2)) for each in forms]
    torch.testing.assert_close(*folded, rtol=0, atol=1e-11)
    forms.separate.load_state_dict(states[0], strict=True)
    assert_same(step(forms.as_one, some(form, seed=1), dy), step(forms.separate, some(form, seed=1), dy))
    forms.as_one.load_state_dict(forms.separate.state_dict(), strict=True)
    assert_same(step(forms.as_one, some(form, seed=1), dy), step(forms.separate, some(form, seed=1), dy))


@each_form
@pytest.mark.parametrize("frozen", ["all", "one"])
def test_frozen_statistics_are_computed_separately(form, frozen):
    """Evaluation mode, of all batch norms or of one: bit for bit, as nothing else computes them."""
    forms = layer(form)
    for each in forms:
        each.train(frozen != "all")
        each.norms()[1].eval()
    for found, expected in zip(*(step(each, some(form)).values() for each in forms), strict=True):
        assert torch.equal(found, expected)


@each_form
def test_cumulative_statistics(form):
    """Of momentum None, the mean over all batches: branch 0 has seen others before, if its pair was trained."""
    forms = layer(form, momentum=None)
    for each in forms:
        each.get_buffer("branches.0.bn.num_batches_tracked").fill_(9)
    for seed in range(3):
        assert difference(forms, some(form, seed=seed)) <= 1e-11


@each_form
def test_running_variance_is_unbiased(form):
    forms = layer(form, momentum=1.0)
    x = some(form, count=2)
    forms.as_one(x)
    conv = forms.as_one.conv_bns()[1]
    expected = conv.conv(x).transpose(0, 1).flatten(1).var(1, unbiased=True)
    torch.testing.assert_close(conv.bn.running_var, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 1, 1)),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 3, 3)),
        (nn.Conv2d(4, 4, 3, 2, 1, groups=4), (1, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 3, 2)),  # smaller than the kernel
        (nn.Conv2d(4, 4, 3, groups=4), (2, 5, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), (0, 4, 6, 6)),
        (nn.Conv2d(4, 4, 1), (1, 4, 1, 1)),
        (nn.Conv2d(4, 6, 1, 2), (1, 4, 2, 2)),
        (nn.Conv2d(32, 6, 1, 2), (1, 32, 2, 2)),
        (nn.Conv2d(4, 4, 1), (2, 5, 6, 6)),
        (nn.Conv2d(32, 4, 1), (2, 5, 6, 6)),
    ],
)
def test_what_torch_refuses_has_its_message(conv, shape):
    """One value for each channel, images smaller than the kernel, other channels, no batch."""
    forms = both_forms(conv, nn.BatchNorm2d(conv.out_channels))
    x, messages = torch.randn(shape), []
    for form in forms:
        try:
            messages.append(str(form(x).shape))
        except (RuntimeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    assert messages[0] == messages[1]


@each_form
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_no_gradients_but_statistics(form, activation):
    torch.manual_seed(0)
    conv = LAYERS[form]()
    forms = to(both_forms(conv, norm(conv.out_channels, activation)), torch.float64)
    before = forms.as_one.get_buffer("branches.1.bn.running_mean").clone()
    with torch.no_grad():
        outputs = [each(some(form)) for each in forms]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for found, expected in zip(*(each.buffers() for each in forms), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(forms.as_one.get_buffer("branches.1.bn.running_mean"), before)


@each_form
def test_parameters_that_do_not_learn(form):
    forms = layer(form)
    for each in forms:
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name in ("branches.1.conv.weight", "branches.0.bn.weight", "branches.2.bn.bias"))
        each(some(form)).square().sum().backward()  # nor does the input
    for (name, found), expected in zip(forms.as_one.named_parameters(), forms.separate.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == (not found.requires_grad)
        if found.requires_grad:
            scale = grad(expected).abs().max().item()
            torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-11 * scale, msg=name)


@each_form
def test_two_backward_passes_and_gradients_that_add_up(form):
    """And each parameter's gradient is memory of its own, as clipping them in place needs."""
    forms = layer(form)
    for each in forms:
        y = each(some(form))
        y.square().sum().backward(retain_graph=True)
        first = [grad(parameter).clone() for parameter in each.parameters()]
        y.square().sum().backward()
        for parameter, once in zip(each.parameters(), first, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * once, rtol=1e-12, atol=1e-12)
        nn.utils.clip_grad_norm_(each.parameters(), 1.0)
        squares = torch.stack([grad(parameter).square().sum() for parameter in each.parameters()])
        torch.testing.assert_close(squares.sum(), torch.ones((), dtype=torch.float64), rtol=1e-4, atol=0)
    for found, expected in zip(*(each.parameters() for each in forms), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-11)


@each_form
@pytest.mark.parametrize("branches", [1, 2])
def test_an_in_place_activation_may_follow(form, branches):
    torch.manual_seed(0)
    conv = LAYERS[form]()
    forms = to(both_forms(conv, nn.BatchNorm2d(conv.out_channels), branches=branches), torch.float64)
    followed = [nn.Sequential(each, nn.ReLU(inplace=True)) for each in forms]
    for each in followed:
        each(some(form)).square().sum().backward()
    for found, expected in zip(*(each.parameters() for each in followed), strict=True):
        scale = max(grad(expected).abs().max().item(), 1.0)
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-11 * scale)


@each_form
def test_mixed_precision_keeps_statistics_in_float32(form):
    """Separate branches take those of outputs that are rounded to 8 bits already, and so do stacked ones."""
    forms, x = rounded(layer(form), torch.float32), some(form).bfloat16()  # as a layer before would give it
    in_float32 = step(copy.deepcopy(forms.as_one), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found, separate = (step(each, x, in_float32["d y"]) for each in forms)
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in separate.items()}
    assert found["y"].dtype == found["d x"].dtype == torch.bfloat16
    tolerance = 2**-7 if form == "stacked" else 1e-5
    for key, value in in_float32.items():
        if "running" in key:
            assert found[key].dtype == torch.float32
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)
        elif key not in ("branches.0.bn.num_batches_tracked", "d y"):
            error, other = ((each[key].float() - value).abs().max() for each in (found, separate))
            assert error <= max(1.5 * other, 0.01 * value.abs().max()), key


# Whole models


def in_both_forms(name) -> tuple[nn.Module, nn.Module]:
    """In float64, with all gammas far from 0."""
    torch.manual_seed(0)
    models = []
    for implementation in ("auto", "separate"):
        model = expand(stock(name), images(name, 1), implementation=implementation)
        models.append(randomize(model).double().train())
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    forms = [module.form for module in models[0].modules() if isinstance(module, MultiBranchConv)]
    assert len(forms) == MODELS[name][2]["depthwise"] + MODELS[name][2]["pointwise"]
    assert None not in forms
    assert all(module.form is None for module in models[1].modules() if isinstance(module, MultiBranchConv))
    return models[0], models[1]


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_whole_models(name):
    """Losses and statistics up to 1e-11. Gradients up to 1e-9 of each tensor, or of a thousandth of the model's
    largest: some vanish, and rounding grows from layer to layer, fastest where a stage has few pixels."""
    models = in_both_forms(name)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9) for model in models]
    target = torch.arange(4) % 10
    for seed in range(2):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(seed)  # for dropout
            losses.append(nn.functional.cross_entropy(model(images(name, 4, seed).double()), target))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-11, atol=0)
    largest = max(grad(parameter).abs().max().item() for parameter in models[1].parameters())
    for (key, found), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        scale = max(grad(expected).abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(grad(found), grad(expected), rtol=0, atol=1e-9 * scale, msg=key)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * expected.abs().max().item(), msg=key)
    for (key, found), expected in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * scale, msg=key)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "ghostnetv2_100"])
def test_each_image_keeps_less_for_the_backward_pass_than_in_the_plain_model(name):
    """Bytes of activations at 64 pixels, of which separate branches keep 1.7 times as many; and, whatever the batch,
    arrays of the size of the weights."""
    plain, x = stock(name), images(name, 8)
    forms = [
        expand(copy.deepcopy(plain), x[:1], implementation=implementation) for implementation in ("auto", "separate")
    ]
    of_four, of_eight = ([bytes_kept(model, x[:count]) for model in (plain, *forms)] for count in (4, 8))
    of_plain, of_one, of_separate = (eight - four for eight, four in zip(of_eight, of_four, strict=True))
    assert of_one <= 0.8 * of_plain
    assert of_separate > 1.7 * of_plain, "what is measured"
    weights = sum(parameter.nbytes for parameter in forms[0].parameters())
    assert of_eight[1] - 2 * of_one <= 2.5 * weights


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """Of distinct storages that autograd saves, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.train()(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
