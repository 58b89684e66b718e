"""Whole students on the device: what they compute expanded and folded, and a step of training."""

import copy
from typing import Any

import torch
from helpers.small_weights import calibrate, randomise
from torch import Tensor, nn

from gpu_stages.numerics.layers import float32_by, interpreted
from gpu_stages.stage import COMPILER, Check, Outcome, Setting
from softshard.trainer.students import build_student, expand, fold

CLASSES = 10
# Norms of differences, relative to those of what is expected. On a CPU folding in float32 loses some 1e-6 of the
# logits, and a step in float64 up to 1e-12 of the gradients. In float32 batch norms amplify rounding from layer to
# layer until whole networks show little: layers.py compares single ones.
FOLD_TOLERANCE, STEP_TOLERANCE = 1e-4, 1e-8


def checks(setting: Setting) -> list[Check]:
    names = ["test_efficientnet"] if setting.tiny else ["mobilenetv2_100", "ghostnetv3_100", "shufflenet_v2_x1_0"]
    triton = ("triton",) if setting.device == "cpu" else ("triton", COMPILER)
    folds = [Check(f"expand and fold: {name}", lambda setting, name=name: check_fold(setting, name)) for name in names]
    steps = [
        Check(f"step: {name}, {form}", lambda setting, name=name, form=form: check_step(setting, name, form), needs)
        for name in names
        for form, needs in (("auto", ()), ("triton", triton))
        if not (setting.tiny and form == "triton")  # Triton's interpreter takes seconds
    ]
    return folds + steps


def check_fold(setting: Setting, name: str) -> Outcome:
    """In evaluation: the expanded student and the folded one on the device, and folded there, against float64."""
    model, x = randomise(_student(setting, name, "auto")), _images(setting, 8)
    calibrate(model, x)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        on_device = copy.deepcopy(model).to(setting.device)
        with float32_by("ieee"):
            found = {
                "expanded": on_device(x.to(setting.device)),
                "folded on the CPU": fold(model).to(setting.device)(x.to(setting.device)),
                "folded on the device": fold(on_device)(x.to(setting.device)),
            }
    outcome = Outcome()
    for what, logits in found.items():
        error = outcome.figures[what] = _error(logits, expected)
        outcome.expect(error <= FOLD_TOLERANCE, f"{what}: logits differ by {error:.1e} (at most {FOLD_TOLERANCE:g})")
    return outcome


def check_step(setting: Setting, name: str, form: str) -> Outcome:
    """Loss and gradients of a step in float64 on the device against separate branches on the CPU."""
    model, separate = _student(setting, name, form), _student(setting, name, "separate")
    count = 2 if setting.tiny else 16
    x, labels = _images(setting, count).double(), torch.arange(count) % CLASSES
    expected = _gradients(separate.double(), x, labels)
    with interpreted(setting.device if form == "triton" else ""):
        found = _gradients(model.double().to(setting.device), x.to(setting.device), labels.to(setting.device))
    outcome = Outcome()
    for what, value, wanted in zip(("loss", "gradient"), found, expected, strict=True):
        error = outcome.figures[what] = _error(value, wanted)
        outcome.expect(error <= STEP_TOLERANCE, f"{what}: error {error:.1e} (at most {STEP_TOLERANCE:g})")
    return outcome


def _student(setting: Setting, name: str, form: str) -> nn.Module:
    """As training begins, but with every branch at work, and without dropout, which differs between devices."""
    torch.manual_seed(0)
    library: Any = "torchvision" if name.startswith("shufflenet") else "timm"
    plain: Any = build_student(name, CLASSES, library=library)
    plain.drop_rate = 0.0
    model = expand(plain, _images(setting, 1), init="split_gamma", implementation=form)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.1)
    return model.to(memory_format=torch.channels_last)


def _images(setting: Setting, count: int) -> Tensor:
    """A size at which strides do not divide the pixels."""
    size = 33 if setting.tiny else 129
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _gradients(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients as one vector."""
    loss = nn.functional.cross_entropy(model.train()(x), labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in whole])


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of what was expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())
