"""Whole students on the device: what they compute expanded and folded, and a step of training."""

import copy
from typing import Any

import torch
from small_weights import randomise
from torch import Tensor, nn

from gpu_stages.layers import float32_by, interpreted
from gpu_stages.stage import COMPILER, Check, Outcome, Setting
from trainer.students import build_student, expand, fold

CLASSES = 10
# Of the logits, relative to the largest; measured are some 1e-6 to 1e-5. In a step also of the gradients, where
# separate branches on the same device lose as much.
FOLD_TOLERANCE = 1e-4
STEP_TOLERANCE, TIMES = 1e-3, 4.0


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
    model, x = _student(setting, name, "auto"), _images(setting, 8)
    _calibrate(model, x)
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
    """Loss and gradients of a step in float32 against float64 on the CPU, beside separate branches on the device."""
    models = {"ours": _student(setting, name, form), "separate": _student(setting, name, "separate")}
    models["separate"].load_state_dict(models["ours"].state_dict())
    x, labels = _images(setting, 2 if setting.tiny else 16), torch.arange(2 if setting.tiny else 16) % CLASSES
    expected = _gradients(copy.deepcopy(models["separate"]).double(), x.double(), labels)
    outcome = Outcome()
    with interpreted(setting.device if form == "triton" else ""), float32_by("ieee"):
        for side, model in models.items():
            loss, gradient = _gradients(model.to(setting.device), x.to(setting.device), labels.to(setting.device))
            outcome.figures[side] = {"loss": _error(loss, expected[0]), "gradient": _error(gradient, expected[1])}
    ours, separate = outcome.figures["ours"], outcome.figures["separate"]
    for what in ("loss", "gradient"):
        limit = max(STEP_TOLERANCE, TIMES * separate[what])
        outcome.expect(ours[what] <= limit, f"{what}: error {ours[what]:.1e} (separate branches {separate[what]:.1e})")
    return outcome


def _student(setting: Setting, name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    library: Any = "torchvision" if name.startswith("shufflenet") else "timm"
    model = expand(build_student(name, CLASSES, library=library), _images(setting, 1), branches_as=form)
    return randomise(model).to(memory_format=torch.channels_last)


def _images(setting: Setting, count: int) -> Tensor:
    """A size at which strides do not divide the pixels."""
    size = 33 if setting.tiny else 129
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _calibrate(model: nn.Module, x: Tensor) -> None:
    """Give every batch norm the statistics of these images, as training would; then evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(x)
    model.eval()


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
