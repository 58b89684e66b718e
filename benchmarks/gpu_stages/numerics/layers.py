"""Layers of branches on the device in every precision, against separate branches in float64 on the CPU.

Compared are the output, every gradient and the running statistics, tensor by tensor. The yardstick is what separate
branches lose of a tensor on the same device in the same precision: one convolution may lose a little more, and near
zero there is a floor. `errors` of tests/helpers/small_branches.py says what an error is relative to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from helpers.small_branches import Results, batch, both_forms, errors, norm, rounded, step
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from gpu_stages.stage import COMPILER, Check, Outcome, Setting, one_line
from gpu_stages.timing import is_broken, synchronize
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fused import depthwise
from softshard.trainer.students.fused.dispatch import trains_as_one

# What one convolution may lose of a tensor at least, relative to its largest entry; where separate branches lose more,
# TIMES as much.
FLOORS = {"float32": 1e-4, "tf32": 5e-2, "bf16": 5e-2, "fp16": 1e-2}
TIMES = 4.0
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A layer and its images [N, C, H, W]; `form`: how its branches must train here, None: as separate branches."""

    name: str
    conv: Callable[[], Any]
    images: tuple[int, ...]
    form: str | None
    activation: str = "relu6"
    mean: float = 1.0  # of the images, whose deviation is 1


def checks(setting: Setting) -> list[Check]:
    triton = ("triton",) if setting.device == "cpu" else ("triton", COMPILER)
    every, few = precisions(setting.device), ("float32", "bf16")  # few where there are hundreds of layers
    kinds = {
        "pointwise": (pointwise_cases, every, ()),
        "depthwise, kernels": (kernel_cases, every, triton),
        "depthwise, channels and means": (channel_cases, every, triton),
        "depthwise, dilated or large": (dilated_cases, every, ()),
        "depthwise, 1 to 40 pixels": (size_cases, few, triton),
    }
    found = []
    for name, (make, chosen, needs) in kinds.items():

        def run(setting: Setting, make=make, chosen=chosen) -> Outcome:
            return compare(setting, make(setting.tiny), chosen)

        found.append(Check(f"layers: {name}", run, needs, 300.0))
    return found


def precisions(device: str) -> Sequence[str]:
    """On a CPU there is no TF32, and torch has not all of its operations in fp16."""
    return tuple(FLOORS) if device == "cuda" else ("float32", "bf16")


def pointwise_cases(tiny: bool) -> Iterator[Case]:
    sizes = [(3, 3, 2, 3), (3, 16, 5, 7)] if tiny else [(3, 3, 2, 3), (3, 16, 5, 7), (16, 24, 28, 28), (8, 160, 7, 7)]
    for size in sizes:
        channels = size[1]
        yield Case(f"{size}, as many", lambda c=channels: nn.Conv2d(c, c, 1, bias=False), size, "closed")
        yield Case(f"{size}, 6 times", lambda c=channels: nn.Conv2d(c, 6 * c, 1), size, "closed", "none")
        yield Case(f"{size}, stride 2", lambda c=channels: nn.Conv2d(c, 2 * c, 1, stride=2), size, "closed", "relu")
        wide = (size[0], 6 * channels, *size[2:])
        yield Case(f"{wide}, a sixth", lambda c=channels: nn.Conv2d(6 * c, c, 1, bias=False), wide, "stacked", "none")
        yield Case(f"{size}, mean 50", lambda c=channels: nn.Conv2d(c, c, 1, bias=False), size, "closed", mean=50.0)


def kernel_cases(tiny: bool) -> Iterator[Case]:
    square = [(3, 2)] if tiny else [(kernel, stride) for kernel in range(1, 8) for stride in (1, 2, 3)]
    for kernel, stride in square:
        conv = _depthwise(kernel, stride=stride, padding=kernel // 2, bias=kernel % 2 == 0)
        yield Case(f"{kernel} x {kernel}, stride {stride}", conv, (2, 6, 5, 7) if tiny else (3, 6, 9, 11), "triton")
    others = {
        "1 x 5": _depthwise((1, 5), padding=(0, 2)),
        "5 x 1": _depthwise((5, 1), padding=(2, 0)),
        "2 x 4, strides 2 and 1": _depthwise((2, 4), stride=(2, 1), padding=(1, 2)),
        "7 x 3 without padding": _depthwise((7, 3)),
        "same, 5, stride 2": lambda: Conv2dSame(6, 6, 5, stride=2, groups=6, bias=False),
        "same, 3, stride 2": lambda: Conv2dSame(6, 6, 3, stride=2, groups=6, bias=False),
    }
    for name, conv in list(others.items())[: 1 if tiny else None]:
        yield Case(name, conv, (4, 6, 10, 9), "triton", "relu")


def size_cases(tiny: bool) -> Iterator[Case]:
    """Every height and width from 1 to 40: images smaller than the kernel, and borders that fall anywhere."""
    for number in (1,) if tiny else range(1, 41):
        for height, width in dict.fromkeys(((number, number), (number, 3 if tiny else 41 - number))):
            for kernel, stride in [(3, 1)] if tiny else [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)]:
                conv = _depthwise(kernel, stride=stride, padding=kernel // 2)
                name = f"{height} x {width}, {kernel} x {kernel}, stride {stride}"
                yield Case(name, conv, (3, 6, height, width), "triton", "none")


def channel_cases(tiny: bool) -> Iterator[Case]:
    sizes = [(2, 17, 2, 3)] if tiny else [(1, 1, 6, 5), (5, 17, 30, 29), (7, 64, 56, 56), (64, 960, 7, 7)]
    for size in sizes:
        for mean in (1.0, 50.0):
            conv = _depthwise(3, padding=1, channels=size[1])
            yield Case(f"{size}, mean {mean:g}", conv, size, "triton", "relu6", mean)


def dilated_cases(tiny: bool) -> Iterator[Case]:
    for kernel, dilation in [(3, 2)] if tiny else [(3, 2), (3, 3), (5, 2), (9, 1)]:
        conv = _depthwise(kernel, padding=dilation * (kernel // 2), dilation=dilation)
        yield Case(f"{kernel} x {kernel}, dilation {dilation}", conv, (4, 6, 19, 18), None)


def _depthwise(kernel: Any, channels: int = 6, bias: bool = False, **settings: Any) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(channels, channels, kernel, groups=channels, bias=bias, **settings)


def compare(setting: Setting, cases: Iterable[Case], precisions: Sequence[str]) -> Outcome:
    """By precision the worst error of one convolution, with that of separate branches in the same place. A layer that
    raises leaves the others, unless it broke the device."""
    outcome, figures = Outcome(), dict[str, dict[str, Any]]()
    outcome.figures = figures
    for case in cases:
        for precision in precisions:
            try:
                with interpreted(setting.device if case.form == "triton" else ""):
                    found = _errors(case, precision, setting.device, outcome)
                synchronize(setting.device)
            except Exception as error:
                outcome.problems.append(f"{case.name}, {precision}: {one_line(error)}")
                if is_broken(setting.device):
                    return outcome
                continue
            _keep_worst(figures.setdefault(precision, {"layers": 0}), case, found)
    return outcome


def _errors(case: Case, precision: str, device: str, outcome: Outcome) -> dict[str, tuple[float, float]]:
    """For each tensor of a step the error of one convolution and that of separate branches."""
    torch.manual_seed(0)
    # rounding moves values across an activation's limits, where gradients jump; in float32 it is rare, and left out
    conv, activation = case.conv(), case.activation if precision == "float32" else "none"
    forms = both_forms(conv, norm(conv.out_channels, activation), implementation="triton")
    x = batch(*case.images, mean=case.mean).to(HALVES.get(precision, torch.float32))
    expected = step(rounded(forms, torch.float64).separate, x.double())
    layers = [form.to(device) for form in forms]
    form = _form_here(layers[0], x.to(device))
    outcome.expect(form == case.form, f"{case.name}: expected to train as {case.form}, found {form}")
    found = (_step_on(layer, x, expected["d y"], precision, device) for layer in layers)
    ours, separate = (errors(results, expected, of_layer=True) for results in found)
    for name in ours:
        limit = max(FLOORS[precision], TIMES * separate[name])
        problem = f"{case.name}, {precision}, {name}: error {ours[name]:.1e} (separate branches {separate[name]:.1e})"
        outcome.expect(ours[name] <= limit, problem)
    return {name: (ours[name], separate[name]) for name in ours}


def _form_here(layer: MultiBranchConv, x: Tensor) -> str | None:
    as_one = layer.form is not None and trains_as_one(layer.form, layer.plain.conv, x, layer.norms())
    return layer.form if as_one else None


def _step_on(layer: MultiBranchConv, x: Tensor, dy: Tensor, precision: str, device: str) -> Results:
    """A step on the device, its results on the CPU; half precision as in training: autocast for the forward pass."""
    if precision in HALVES:
        layer.forward = torch.autocast(device, HALVES[precision])(layer.forward)
    with float32_by("tf32" if precision == "tf32" else "ieee"):
        results = step(layer, x.to(device), dy.to(device))
    layer.__dict__.pop("forward", None)
    return {name: value.cpu() for name, value in results.items()} | {"d y": dy}


def _keep_worst(figures: dict[str, Any], case: Case, found: dict[str, tuple[float, float]]) -> None:
    figures["layers"] += 1
    name, (ours, separate) = max(found.items(), key=lambda item: item[1])
    if ours >= figures.get("worst", 0.0):
        figures |= {"worst": ours, "separate there": separate, "where": f"{case.name}: {name}"}
    worst = max(error for _, error in found.values())
    figures["worst of separate"] = max(worst, figures.get("worst of separate", 0.0))


@contextmanager
def float32_by(precision: str) -> Iterator[None]:
    """How matrix products and convolutions of float32 are computed on a GPU: "ieee", or "tf32" with its ten bits."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore[reportAttributeAccessIssue]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = precision
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@contextmanager
def interpreted(device: str) -> Iterator[None]:
    """On a CPU the kernels for GPUs take the place of those for the CPU, in Triton's interpreter."""
    before = depthwise.kernels_for
    if device == "cpu":
        on_gpu = depthwise.kernels_for("cuda")
        depthwise.kernels_for = lambda device: on_gpu
    try:
        yield
    finally:
        depthwise.kernels_for = before
