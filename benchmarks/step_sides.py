"""The sides of step.py: a student with all that trains it, and the steps that it takes with and without a teacher."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import timm
import timm.task
import torch
from accelerate import Accelerator
from store import manifest, synthetic_logits
from torch import nn

from softshard.pipeline.recipes.yaml_file import Override, load_recipe
from softshard.pipeline.store.store import create_store
from softshard.pipeline.store.topk import encode, encode_template
from softshard.pipeline.views.batch import Batch
from softshard.trainer.data.soft_labels import EpochLabels, LabelReader, Labels
from softshard.trainer.loop.train_state import TrainState, make_train_state
from softshard.trainer.losses import distillation_loss
from softshard.trainer.recipe import TrainRecipe

RECIPE = Path(__file__).parents[1] / "configs/train/ghostnetv3_100.yaml"
ON_A_CPU: list[Override] = [("precision", "float32"), ("accumulation", "1")]
STUDENTS: dict[str, list[Override]] = {
    "plain": [("student.expand", "null")],
    "expanded": [],
    "separate": [("student.expand.implementation", "separate")],
}
TEACHER, CLASSES, K, CPU = "deit_base_patch16_224", 1000, 10, torch.device("cpu")
LABELED = 4096  # rows of the store
Step = Callable[[], None]


@dataclass(frozen=True)
class Training:
    """A student, its optimizer and average, and one batch, which all of its sides share."""

    state: TrainState
    batch: Batch
    updates: Iterator[int] = field(default_factory=count)


def make_training(student: str, images: int, size: int) -> Training:
    recipe = load_recipe(TrainRecipe, RECIPE, [*ON_A_CPU, *STUDENTS[student], ("data.size", str(size))])
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, size, size), np.uint8))
    labels, rows = torch.from_numpy(rng.integers(0, CLASSES, images)), rng.integers(0, LABELED, images)
    batch = Batch(pixels.to(memory_format=torch.channels_last), rows, labels, None)
    return Training(make_train_state(Accelerator(cpu=True), recipe, steps=1000), batch)


def make_teacher(size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(TEACHER, num_classes=CLASSES, img_size=size).eval()


def make_labels(folder: Path, with_template: bool) -> EpochLabels:
    """A view of a store of made-up codes."""
    logits = synthetic_logits().flatten(0, 1)[:LABELED]
    shape = manifest(LABELED, CLASSES, K, LABELED, with_template)
    store = create_store(folder, shape, np.arange(LABELED, dtype=np.uint64), np.zeros(LABELED, np.uint32))
    store.write_block(0, 0, encode(logits, K))
    template = None
    if with_template:
        store.write_template(0, encode_template(logits[:, None]).numpy())
        template = store.read_template()
    with LabelReader([Labels(store, np.arange(LABELED), template, None, 1.0)]) as reader:
        labels = reader.labels(0, 0)
    assert labels
    return labels


def training_step(training: Training, labels: EpochLabels | None) -> Step:
    """A step of the trainer, on hard labels alone when there are no others."""
    state, batch = training.state, training.batch

    def step() -> None:
        update = next(training.updates)
        state.begin(update)
        soft = labels.soft(batch.rows, state.temperature(update), CPU) if labels else []
        state.learn(update, batch, soft)

    return step


def labels_step(training: Training, labels: EpochLabels | None) -> Step:
    """What the labels of a step take, without the student: from a view's codes to the gradient of the logits."""
    loss, batch = training.state.recipe.loss, training.batch
    logits = torch.randn(len(batch.labels), CLASSES, requires_grad=True)

    def step() -> None:
        soft = labels.soft(batch.rows, loss.temperature, CPU) if labels else []
        settings = loss.model_dump(exclude={"final_temperature"})
        distillation_loss(logits, batch.labels, soft, **settings).total.backward()

    return step


def online_step(training: Training, teacher: nn.Module) -> Step:
    """The same step with timm's task, whose teacher labels the batch; pixels are normalized as timm's loader does."""
    state, batch = training.state, training.batch
    student, loss = state.student, state.recipe.loss
    task = timm.task.LogitDistillationTask(
        student.network,
        teacher,
        nn.CrossEntropyLoss(label_smoothing=loss.label_smoothing),
        task_loss_weight=1 - loss.alpha,
        temperature=loss.temperature,
        verbose=False,
    )

    def step() -> None:
        update = next(training.updates)
        state.begin(update)
        images = student.normalized(batch.images)
        task(images, batch.labels)["loss"].backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema:
            state.ema.update(student, step=update + 1)

    return step


def passes_step(training: Training) -> Step:
    """The student's forward and backward pass alone, without soft labels, optimizer and average."""
    state, batch = training.state, training.batch

    def step() -> None:
        nn.functional.cross_entropy(state.model(batch.images), batch.labels).backward()
        state.optimizer.zero_grad()

    return step


def labeling_step(training: Training, teacher: nn.Module) -> Step:
    """What labels of the batch cost, once."""
    student, batch = training.state.student, training.batch

    @torch.inference_mode()
    def step() -> None:
        encode(teacher(student.normalized(batch.images)), K)

    return step
