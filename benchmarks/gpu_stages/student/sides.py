"""A student with all that trains it and one batch: what every side of the student's stage is made of."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm.optim
import torch
from numpy.typing import NDArray
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from gpu_stages.stage import Setting
from gpu_stages.timing import random_images
from softshard.pipeline.store.topk import Codes, SoftLabels, decode_on, encode, encode_template
from softshard.trainer.losses import distillation_loss
from softshard.trainer.student import Student
from softshard.trainer.students import build_student, expand
from softshard.trainer.students.branches import MultiBranchConv

# The values of configs/train/; the learning rate is one of the first epoch's, from which no start diverges.
ALPHA, SMOOTHING, DECAY, WEIGHT_DECAY, LR = 0.9, 0.1, 0.9999, 0.05, 1e-3
TEMPERATURE = 1.0
# The product's forms, by what they are called in the figures. On a GPU `auto` trains 1 x 1 layers in closed form and
# depthwise ones as separate branches; on a CPU those have kernels in C.
FORMS: dict[str, str | None] = {"plain": None, "separate": "separate", "closed": "auto", "triton": "triton"}
SEPARATE, IN_C = "separate", "kernels in C"


@dataclass(frozen=True)
class Size:
    """`batches`: a usual one and a large one."""

    pixels: int
    classes: int
    k: int
    batches: tuple[int, int]
    rounds: int
    warmup: int


def size_of(setting: Setting) -> Size:
    return Size(64, 10, 4, (2, 3), 1, 0) if setting.tiny else Size(224, 1000, 10, (256, 1024), 12, 3)


@dataclass(frozen=True)
class Batch:
    """Images and hard labels on the device; the codes of their soft labels and their tail templates in memory."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    codes: Codes
    template: NDArray[np.uint8]


def random_batch(images: int, size: Size, device: torch.device, layout: torch.memory_format) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, size.classes, (images,), generator=generator)
    logits = 3 * torch.randn(images, size.classes, generator=generator)
    template = encode_template(logits[:, None]).numpy()
    pixels = random_images(images, size.pixels, device, layout)
    return Batch(pixels, labels.to(device), encode(logits, size.k), template)


class TrainableStudent:
    """A student, its optimizer and average as trainer/loop/train_state.py makes them.

    `model` is what runs: the student, or what was compiled from it.
    """

    def __init__(self, student: Student, device: torch.device) -> None:
        self.student, self.device = student, device
        self.model: Callable[[Tensor], Tensor] = student
        self.optimizer = timm.optim.create_optimizer_v2(student.network, "lamb", LR, WEIGHT_DECAY)
        self.ema = ModelEmaV3(student, DECAY)
        self.updates = 0

    def hard_passes(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward with the least of a loss; its value, detached."""
        with self.autocast():
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Weights and their average; gradients stay, since those of a captured pass must."""
        self.optimizer.step()
        self.updates += 1
        self.ema.update(self.student, step=self.updates)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)


class Training(TrainableStudent):
    """A student with one batch, and the parts of a step."""

    def __init__(self, student: Student, batch: Batch, size: Size, device: torch.device) -> None:
        super().__init__(student, device)
        self.batch, self.size = batch, size

    def step(self) -> Tensor:
        """A whole step of training; the value of its loss."""
        loss = self.passes(self.soft())
        self.update()
        self.optimizer.zero_grad()
        return loss

    def soft(self) -> SoftLabels:
        batch = self.batch
        return decode_on(self.device, batch.codes, self.size.classes, TEMPERATURE, batch.template)

    def passes(self, soft: SoftLabels) -> Tensor:
        """Forward and backward, on both kinds of labels. The value is detached: a loss that were kept would keep the
        nodes of its graph, and with them the stream that they were made on."""
        with self.autocast():
            logits = self.model(self.batch.images)
        loss = distillation_loss(
            logits.float(),
            self.batch.labels,
            [(1.0, soft)],
            alpha=ALPHA,
            temperature=TEMPERATURE,
            tail="spread",
            label_smoothing=SMOOTHING,
        ).total
        loss.backward()
        return loss.detach()

    def passes_alone(self) -> Tensor:
        """What no trainer can do without."""
        loss = self.hard_passes(self.batch.images, self.batch.labels)
        self.optimizer.zero_grad()
        return loss


def make_training(model: str, form: str, images: int, setting: Setting, channels_last: bool = True) -> Training:
    size, device = size_of(setting), torch.device(setting.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student = make_student(model, FORMS[form], size.classes, size.pixels, device, layout)
    return Training(student, random_batch(images, size, device, layout), size, device)


def make_student(
    model: str,
    implementation: str | None,
    classes: int,
    pixels: int,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
    branches: int = 3,
) -> Student:
    """A student with its branches in an implementation of the product, None: the plain model."""
    torch.backends.cudnn.benchmark = True  # as trainer/loop/train.py has it
    torch.manual_seed(0)
    network = build_student(model, classes)
    if implementation:
        example = torch.zeros(1, 3, pixels, pixels)
        network = expand(network, example, branches=branches, implementation=implementation)
    return Student(network).to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def layers_by_form(training: Training) -> dict[str, int]:
    """How many layers of branches train in which form: each was asked during a forward pass, as it asks itself."""
    counts: Counter[str] = Counter()

    def ask(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, MultiBranchConv)
        form, on_cpu = module.form_for(arguments[0]), arguments[0].device.type == "cpu"
        counts[SEPARATE if form is None else IN_C if on_cpu and form in ("depthwise", "triton") else form] += 1

    layers = [module for module in training.student.modules() if isinstance(module, MultiBranchConv)]
    hooks = [layer.register_forward_pre_hook(ask) for layer in layers]
    with torch.no_grad(), training.autocast():
        training.student(training.batch.images)
    for hook in hooks:
        hook.remove()
    return dict(counts)


def wrong_layers(form: str, found: dict[str, int], on_gpu: bool) -> str:
    """What is not as the form claims; empty when all is. On a CPU depthwise layers have kernels in C, or none."""
    as_one = {name for name in found if name != SEPARATE}
    if form == "plain":
        wrong = bool(found)
    elif form == SEPARATE:
        wrong = bool(as_one) or not found
    else:
        expected = {"closed", "triton"} if form == "triton" and on_gpu else {"closed"}
        allowed = expected | {"stacked"} | (set() if on_gpu else {IN_C})
        wrong = not expected <= as_one <= allowed or (form == "triton" and on_gpu and SEPARATE in found)
    return f"expected layers in the form {form}, found {found or 'no layers of branches'}" if wrong else ""
