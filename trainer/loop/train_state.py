"""The student with everything that changes it: optimizer, schedule, average. One update after the other."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.layers
import timm.optim
import timm.scheduler
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.models import model_parameters
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from softshard.pipeline.runtime.errors import RecipeError
from softshard.pipeline.views.batch import Batch
from softshard.trainer.losses import Losses, Weighted, distillation_loss, mixed_labels
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import Student, make_student


@dataclass
class TrainState:
    """A student and what changes it.

    Updates are counted from 0 over the whole run; `updates` of them make it up. The learning rate, the temperature and
    the random numbers of an update are functions of its number.
    """

    accelerator: Accelerator
    recipe: TrainRecipe
    updates: int
    student: Student
    model: nn.Module  # the student, compiled where the recipe asks for it, wrapped for its device and processes
    optimizer: Any  # accelerate's, around one of timm's
    schedule: Scheduler
    ema: ModelEmaV3 | None

    @property
    def students(self) -> dict[str, Student]:
        """What is validated: the weights, and their average where the recipe asks for one."""
        return {"weights": self.student} | ({"ema": self.ema.module} if self.ema else {})  # pyright: ignore

    @property
    def result(self) -> Student:
        """What a run is for: the average of the weights where there is one, otherwise the weights."""
        return list(self.students.values())[-1]

    @property
    def steps(self) -> int:
        """Updates of an epoch."""
        return self.updates // self.recipe.schedule.epochs

    @property
    def lr(self) -> float:
        """The learning rate of the current update."""
        return self.optimizer.param_groups[0]["lr"]

    def temperature(self, update: int) -> float:
        """The temperature of an update."""
        first, last = self.recipe.loss.temperature, self.recipe.loss.final_temperature
        return first if last is None else first + (last - first) * update / max(1, self.updates - 1)

    def begin(self, update: int) -> None:
        """Prepare an update: its learning rate, and its random numbers (dropout), different in each process."""
        self.schedule.step_update(update)
        words = np.random.SeedSequence((self.recipe.seed, update, self.accelerator.process_index))
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))

    def learn(self, update: int, batch: Batch, soft: Sequence[Weighted]) -> Losses:
        """Forward and backward on a part of the update's batch; the last of its parts changes the weights.

        Args:
            update: Its number in the run.
            batch: The part.
            soft: Labels of each teacher with their weights, decoded at the update's temperature; empty: none.

        Returns:
            The losses of the part, on the device.
        """
        with self.accelerator.accumulate(self.model):
            loss = self.recipe.loss
            losses = distillation_loss(
                self.model(batch.images),  # under autocast, which prepare has put into its forward
                self._hard(batch),
                soft,
                alpha=loss.alpha,
                temperature=self.temperature(update),
                tail=loss.tail,
                label_smoothing=loss.label_smoothing,
            )
            self.accelerator.backward(losses.total)
            if self.accelerator.sync_gradients:
                self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.ema and self.accelerator.sync_gradients:
            self.ema.update(self.student, step=update + 1)
        return losses

    def _hard(self, batch: Batch) -> Tensor:
        if batch.mixed is None:
            return batch.labels
        return mixed_labels(batch.labels, *batch.mixed, self.recipe.student.num_classes)

    def _clip(self) -> None:
        optimizer = self.recipe.optimizer
        if optimizer.clip_grad is not None:
            self.accelerator.unscale_gradients()
            adaptive = optimizer.clip_mode == "agc"  # its paper leaves out the classifier, and so does timm
            parameters = model_parameters(self.student.network, exclude_head=adaptive)
            dispatch_clip_grad(parameters, optimizer.clip_grad, optimizer.clip_mode)

    def is_finite(self) -> bool:
        """Whether all weights are; waits for the device."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.student.parameters()])
        return bool(torch.stack(norms).isfinite().all())

    def broadcast_statistics(self) -> None:
        """Give all processes the first one's batch norm statistics: each has those of its own images."""
        if self.accelerator.num_processes > 1:
            for student in self.students.values():
                broadcast([buffer for _, buffer in sorted(student.named_buffers())])

    def state_dict(self) -> dict[str, Any]:
        """All that must be kept to resume; the schedule is a function of the update."""
        return {
            "student": self.student.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def make_train_state(accelerator: Accelerator, recipe: TrainRecipe, steps: int) -> TrainState:
    """The state at the start of a run.

    Args:
        accelerator: Prepares the student and its optimizer for device and processes.
        recipe: Of the run.
        steps: Updates of an epoch.

    Raises:
        RecipeError: An unknown model, options that the optimizer does not have, and what expand refuses.
        DataError, FormatError: Weights to start from that do not fit or cannot be read.
    """
    with accelerator.local_main_process_first():  # one download serves all processes of a machine
        student = make_student(recipe).to(accelerator.device)
    if recipe.sync_batch_norm and accelerator.num_processes > 1:
        timm.layers.convert_sync_batchnorm(student)  # a Student is no norm itself: its modules are replaced in place
    # 1 x 1 kernels have strides that mean nothing, and the gradients are copied in any case
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    ema = ModelEmaV3(student, recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema else None
    optimizer = make_optimizer(recipe, student.network)
    schedule = make_schedule(recipe, optimizer, steps)
    model, wrapped = accelerator.prepare(_compiled(student) if recipe.compile else student, optimizer)
    return TrainState(accelerator, recipe, recipe.schedule.epochs * steps, student, model, wrapped, schedule, ema)


def _compiled(student: Student) -> Any:
    for module in student.modules():
        if hasattr(module, "inplace"):
            # between compiled parts torch loses track of what was changed in place
            module.inplace = False  # pyright: ignore[reportArgumentType]
    return torch.compile(student)


def make_optimizer(recipe: TrainRecipe, network: nn.Module) -> Optimizer:
    """Make timm's optimizer, without weight decay for norms, biases and what the network names (position embeddings).

    Raises:
        RecipeError: It does not have one of the options, or does not work here.
    """
    wanted, options = recipe.optimizer, dict[str, Any](recipe.optimizer.options)
    try:
        return timm.optim.create_optimizer_v2(network, wanted.name, wanted.lr, wanted.weight_decay, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"optimizer.options: expected arguments of {wanted.name}, found {options}: {error}; correct them"
        ) from None
    except (AssertionError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"optimizer.name: expected an optimizer that works here, found {wanted.name}: {error}; name another one"
        ) from None


def make_schedule(recipe: TrainRecipe, optimizer: Optimizer, steps: int) -> Scheduler:
    """Make timm's schedule: the learning rate as a function of the number of updates, warming up from zero."""
    wanted = recipe.schedule
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        {"linear": "poly", "constant": "step"}.get(wanted.name, wanted.name),  # of power 1; of no steps
        num_epochs=wanted.epochs,
        decay_epochs=wanted.decay_epochs or wanted.epochs,
        decay_rate=wanted.decay_rate or 1.0,
        warmup_epochs=wanted.warmup_epochs,
        warmup_lr=0.0,
        min_lr=wanted.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    assert schedule is not None
    return schedule
