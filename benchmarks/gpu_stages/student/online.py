"""timm's own step, and its online distillation: what a step with stored labels is measured against."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gpu_stages.stage import Outcome, Setting
from gpu_stages.student.figures import Figures, Sides, attempt, begin, cost_of, layers_of, measure
from gpu_stages.student.sides import ALPHA, SMOOTHING, TEMPERATURE, Training, make_training, size_of
from gpu_stages.timing import Step

TEACHERS = ("deit_base_patch16_224", "beitv2_base_patch16_224")


def online(model: str, forms: Sequence[str], images: int, setting: Setting) -> Outcome:
    """`students` has for each form ours, timm's step, the passes alone, and timm's step with each teacher: how long
    that takes relative to ours (`times`), and what this could be at most, if nothing but the student's passes s and the
    teacher's t, which `teachers` has, took any time: (s + t) / s (`ceiling`)."""
    outcome = begin(model, images, "channels_last", "online", setting)
    students, teachers = {form: Sides() for form in forms}, Sides()
    outcome.figures |= {"students": students, "teachers": teachers}
    for form, sides in students.items():
        _alone(outcome, sides, model, form, images, setting)
    for name in TEACHERS:
        _together(outcome, students, teachers, model, name, images, setting)
    for sides in students.values():
        _compare(sides, teachers)
    return outcome


def _alone(outcome: Outcome, sides: Sides, model: str, form: str, images: int, setting: Setting) -> None:
    training = make_training(model, form, images, setting)
    steps: dict[str, Callable[[], Step]] = {
        "ours": lambda: training.step,
        "timm": lambda: task_step(training, hard_task(training)),
        "passes": lambda: training.passes_alone,
    }

    def side(name: str) -> Figures:
        training.optimizer.zero_grad()  # where the side before had to stop
        found = layers_of(outcome, training, form, setting)
        return found | measure(outcome, f"{form}, {name}", steps[name](), images, setting)

    for name in steps:
        attempt(outcome, sides, name, lambda name=name: side(name), setting)


def _together(
    outcome: Outcome,
    students: dict[str, Sides],
    teachers: Sides,
    model: str,
    name: str,
    images: int,
    setting: Setting,
) -> None:
    made: list[nn.Module] = []

    def alone() -> Figures:
        made.append(make_teacher(name, setting))
        return cost_of(teacher_step(make_training(model, "plain", images, setting), made[0]), images, setting)

    def side(form: str) -> Figures:
        training = make_training(model, form, images, setting)
        step = task_step(training, online_task(training, made[0]))
        return measure(outcome, f"{form}, {name}", step, images, setting)

    attempt(outcome, teachers, name, alone, setting)
    for form, sides in students.items():
        attempt(outcome, sides, name, lambda form=form: side(form), setting)


def _compare(sides: Sides, teachers: Sides) -> None:
    ours, passes = (sides.get(name, {}).get("ms") for name in ("ours", "passes"))
    for name in TEACHERS:
        both, teacher = (found.get(name, {}).get("ms") for found in (sides, teachers))
        if both and ours:
            sides[name]["times"] = both / ours
        if both and passes and teacher:
            sides[name]["ceiling"] = (passes + teacher) / passes


def make_teacher(name: str, setting: Setting) -> nn.Module:
    """With random weights: the time does not depend on them."""
    size = size_of(setting)
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": size.classes}
    teacher = (
        timm.create_model("test_vit", img_size=size.pixels, **options)
        if setting.tiny
        else timm.create_model(name, **options)
    )
    layout = {"memory_format": torch.channels_last}
    return teacher.eval().requires_grad_(False).to(setting.device).to(**layout)


def teacher_step(training: Training, teacher: nn.Module) -> Step:
    """The teacher's forward pass alone, as it is in a step of online distillation."""

    @torch.no_grad()
    def step() -> None:
        with training.autocast():
            teacher(training.student.normalized(training.batch.images))

    return step


def hard_task(training: Training) -> nn.Module:
    """timm's task without a teacher."""
    from timm.task import ClassificationTask

    return ClassificationTask(training.student.network, _criterion(), device=training.device, verbose=False)


def online_task(training: Training, teacher: nn.Module) -> nn.Module:
    """timm's task whose teacher labels the batch in the step."""
    from timm.task import LogitDistillationTask

    return LogitDistillationTask(
        training.student.network,
        teacher,
        _criterion(),
        task_loss_weight=1 - ALPHA,
        temperature=TEMPERATURE,
        device=training.device,
        verbose=False,
    )


def _criterion() -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=SMOOTHING)


def task_step(training: Training, task: nn.Module) -> Step:
    """A step as timm's train.py takes it, with the optimizer and the average of ours: pixels are normalized by its
    loader, and task and loss run under autocast."""

    def step() -> Tensor:
        images = training.student.normalized(training.batch.images)
        with training.autocast():
            loss = task(images, training.batch.labels)["loss"]
        loss.backward()
        training.update()
        training.optimizer.zero_grad()
        return loss.detach()

    return step
