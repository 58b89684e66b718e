"""Layers of branches in both forms, through one convolution and separately, and how far apart their results are."""

import copy
from typing import NamedTuple

import torch
from helpers.small_weights import grad, randomise
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from softshard.trainer.students.branches import MultiBranchConv

ACTIVATIONS = {"none": None, "relu": nn.ReLU, "relu6": nn.ReLU6}
Results = dict[str, Tensor]  # y, d x, gradients and buffers by their names


class Forms(NamedTuple):
    """The same layer twice."""

    as_one: MultiBranchConv
    separate: MultiBranchConv


def both_forms(conv, bn, *, branches=2, scale_branch=True, identity=True, implementation="auto", seed=1) -> Forms:
    """In training, with weights, gammas and statistics that are nowhere zero, so that every branch counts."""
    wanted = {"branches": branches, "scale_branch": scale_branch, "identity": identity}
    separate = MultiBranchConv(copy.deepcopy(conv), copy.deepcopy(bn), implementation="separate", **wanted)
    as_one = MultiBranchConv(conv, bn, implementation=implementation, **wanted)
    randomise(as_one, seed)
    separate.load_state_dict(as_one.state_dict(), strict=True)
    assert separate.form is None
    return Forms(as_one.train(), separate.train())


def norm(channels: int, activation: str = "none"):
    """A batch norm, with an activation as timm has it."""
    act = ACTIVATIONS[activation]
    return nn.BatchNorm2d(channels) if act is None else BatchNormAct2d(channels, act_layer=act)


def to(forms: Forms, dtype: torch.dtype) -> Forms:
    return Forms(*(form.to(dtype) for form in forms))


def batch(*shape: int, seed=0, mean=1.0) -> Tensor:
    """Images with a deviation of 1 and means of about `mean`, which differ between channels; float64, channels last."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    x += mean * (1 + torch.rand(1, shape[1], 1, 1, generator=draw, dtype=torch.float64))
    return x.contiguous(memory_format=torch.channels_last)


def gradient_of(y: Tensor, act: nn.Module | None) -> Tensor:
    """A random gradient of the output: 0 where an activation's limit is so near that rounding decides on its side."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if act is not None:
        dy[((y > 0) & (y < 1e-3)) | ((y - 6).abs() < 1e-3)] = 0  # what is 0 was well below, but for one in thousands
    return dy.float().double()


def step(layer: MultiBranchConv, x: Tensor, dy: Tensor | None = None) -> Results:
    """What a step of training sees: the output, all gradients (of the output: `dy`, or one of gradient_of) and the
    statistics after it."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = gradient_of(y.detach(), layer.act) if dy is None else dy
    y.backward(dy.to(y.dtype))
    gradients = {f"d {name}": grad(parameter) for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "d y": dy, "d x": grad(x), **gradients, **dict(layer.named_buffers())}


def errors(found: Results, expected: Results, of_layer: bool = False) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest entry.

    Gradients of parameters relative to a hundredth of the layer's largest where they are smaller, `of_layer` to the
    layer's largest. For some are 0 or nearly, as differences of larger numbers: those of a bias before a batch norm, of
    a weight that only scales what the batch norm scales back, as does the one weight of a channel's 1 x 1 branch, and
    in images of a few pixels of weights that see little but padding. `of_layer` takes the input's gradient, too,
    relative to the output's where it is smaller: two pixels are -1 and 1 after a batch norm, whatever they were before.
    """
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for name, value in expected.items() if _is_of_parameter(name))
    result = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].isfinite().all(), name
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        least = largest * (1.0 if of_layer else 0.01) if _is_of_parameter(name) else 1e-30
        if of_layer and name == "d x":
            least = expected["d y"].abs().max().item()
        scale = max(value.abs().max().item(), least)
        result[name] = (found[name].double() - value.double()).abs().max().item() / scale
    return result


def _is_of_parameter(name: str) -> bool:
    return name.startswith("d ") and name not in ("d x", "d y")


class Errors(NamedTuple):
    """The worst ones in a step against separate branches in float64."""

    exact: float  # of the one convolution in float64
    as_one: float  # in the rounded dtype
    separate: float  # in the rounded dtype


def difference(forms: Forms, x: Tensor, of_layer: bool = False) -> float:
    """The worst error of the one convolution in a step."""
    expected = step(forms.separate, x)
    return max(errors(step(forms.as_one, x, expected["d y"]), expected, of_layer).values())


def rounded(forms: Forms, dtype: torch.dtype) -> Forms:
    return Forms(*(copy.deepcopy(form).to(dtype) for form in forms))


def errors_of_step(forms: Forms, others: Forms, x: Tensor, of_layer: bool = False) -> Errors:
    """A step of a layer in float64 and of its `rounded` copies."""
    dtype = next(others.as_one.parameters()).dtype
    x = x.to(dtype)
    expected = step(forms.separate, x.double())
    dy = expected["d y"]
    found = (step(forms.as_one, x.double(), dy), step(others.as_one, x, dy), step(others.separate, x, dy))
    return Errors(*(max(errors(each, expected, of_layer).values()) for each in found))


def errors_in_float32(forms: Forms, x: Tensor, of_layer: bool = False) -> Errors:
    return errors_of_step(forms, rounded(forms, torch.float32), x, of_layer)
