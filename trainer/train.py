"""The training loop: views and their stored soft labels in, a student out; the teacher is not here."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.optim
import timm.scheduler
import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.launch import StopSignal, make_accelerator
from pipeline.loader import ViewLoader
from pipeline.views.draws import stream
from trainer.checkpoint import load_checkpoint, open_run, save_checkpoint, save_weights
from trainer.data import TrainingSet, open_training_set, open_validation_set, share
from trainer.evaluate import top1, validation_loader
from trainer.losses import distillation_loss, mixed_labels
from trainer.recipe import TrainRecipe
from trainer.student import Student, make_student


def train(recipe: TrainRecipe) -> bool:
    """Train to the end of the schedule, going on after the last finished epoch of the run folder; False when a signal
    ended the work before.

    Raises DataError when data, store and recipe do not fit together or the loss is not finite.
    """
    accelerator = make_accelerator("train")
    _show_log(accelerator)
    training, validation = open_training_set(recipe), open_validation_set(recipe)
    if recipe.batch_size % accelerator.num_processes:
        raise DataError(
            f"batch_size: expected a multiple of the {accelerator.num_processes} processes, found {recipe.batch_size}"
        )
    with accelerator.main_process_first():
        folder = open_run(recipe, training.beton.manifest.classes)
    state = _start(accelerator, recipe, training, load_checkpoint(folder))
    epochs, steps = recipe.schedule.epochs, state.steps
    loader = validation_loader(recipe, validation, accelerator)
    done, total = len(state.metrics) * steps, epochs * steps
    quiet = not accelerator.is_main_process or done == total
    with StopSignal() as stop, tqdm(total=total, initial=done, unit="step", disable=quiet) as progress:
        for epoch in range(len(state.metrics), epochs):
            progress.set_description(f"train {recipe.output} epoch {epoch + 1}/{epochs}")
            measured = state.train_epoch(epoch, stop, progress)
            if measured is None:
                return False
            measured["top1"] = top1(accelerator, state.evaluated, loader, validation)
            state.metrics.append(measured)
            progress.set_postfix(loss=f"{measured['loss']:.3f}", top1=f"{measured['top1']:.2f}")
            if accelerator.is_main_process:
                save_checkpoint(folder, state.checkpoint())
    if accelerator.is_main_process:
        save_weights(folder, state.evaluated.network)
    accelerator.wait_for_everyone()
    return True


def _show_log(accelerator: Accelerator) -> None:
    """Let one process say what the trainer's modules log: what expand did and what it left alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)


@dataclass
class _State:
    """Everything that changes while a run trains, and what is needed to change it."""

    accelerator: Accelerator
    recipe: TrainRecipe
    training: TrainingSet
    loader: ViewLoader
    student: Student
    model: nn.Module  # the student, wrapped for its device and processes
    optimizer: Any  # accelerate's, around one of timm's
    schedule: Scheduler
    ema: ModelEmaV3 | None
    metrics: list[dict[str, float]]

    @property
    def steps(self) -> int:
        return self.training.steps(self.recipe.batch_size)

    @property
    def evaluated(self) -> Student:
        """The averaged student where the recipe asks for one, otherwise the student itself."""
        return self.ema.module if self.ema else self.student  # pyright: ignore[reportReturnType]

    def train_epoch(self, epoch: int, stop: StopSignal, progress: tqdm) -> dict[str, float] | None:
        """One epoch over one view; its figures, or None when a stop signal came."""
        started, labels = time.perf_counter(), self.training.labels(epoch)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        order = self.training.order(self.recipe.seed, epoch)
        rows = share(order, self.recipe.batch_size, rank, processes)
        torch.manual_seed(int(stream(self.recipe.seed, epoch, rank)))  # dropout: a function of epoch and process
        self.model.train()
        losses = []
        for batch in self.loader.render(rows, self.training.view(epoch)):
            if stop.received:
                return None
            soft = labels.soft(batch.rows, self.recipe.loss.temperature, self.accelerator.device) if labels else None
            losses.append(self._step(epoch * self.steps + len(losses), batch, soft))
            progress.update()
        mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean")
        loss = float(mean)  # pyright: ignore[reportArgumentType]
        if not np.isfinite(loss):
            raise DataError(
                f"epoch {epoch + 1}: expected a finite loss, found {loss}; lower optimizer.lr, or warm up longer"
            )
        seconds = time.perf_counter() - started
        rate = len(losses) * self.recipe.batch_size / seconds
        return {"epoch": epoch + 1, "view": self.training.view(epoch), "loss": loss, "images_per_second": rate}

    def _step(self, update: int, batch, soft) -> torch.Tensor:
        loss_recipe = self.recipe.loss
        self.schedule.step_update(update)
        with self.accelerator.autocast():
            logits = self.model(batch.images)
        hard, mixed = batch.labels, batch.mixed
        if mixed:
            hard = mixed_labels(hard, mixed.labels, mixed.shares, self.recipe.student.num_classes)
        loss = distillation_loss(
            logits,
            hard,
            soft,
            alpha=loss_recipe.alpha,
            temperature=loss_recipe.temperature,
            tail=loss_recipe.tail,
            label_smoothing=loss_recipe.label_smoothing,
        )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.student, step=update + 1)
        return loss.detach()

    def checkpoint(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "metrics": self.metrics,
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self.student.load_state_dict(checkpoint["student"])
        if self.ema:
            self.ema.module.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.accelerator.scaler and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.metrics = checkpoint["metrics"]


def _start(accelerator: Accelerator, recipe: TrainRecipe, training: TrainingSet, checkpoint: dict | None) -> _State:
    """The state at the beginning of a run, or after the checkpoint's last epoch."""
    with accelerator.main_process_first():  # one download serves all processes
        student = make_student(recipe).to(accelerator.device)
    ema = ModelEmaV3(student, recipe.ema.decay, use_warmup=True) if recipe.ema else None
    optimizer = timm.optim.create_optimizer_v2(
        student, recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay
    )
    schedule = _schedule(recipe, optimizer, training.steps(recipe.batch_size))
    model, wrapped = accelerator.prepare(student, optimizer)
    loader = ViewLoader(
        training.beton,
        training.views,
        recipe.data.size,
        recipe.batch_size // accelerator.num_processes,
        recipe.data.workers,
        accelerator.device,
    )
    state = _State(accelerator, recipe, training, loader, student, model, wrapped, schedule, ema, [])
    if checkpoint:
        state.restore(checkpoint)
    return state


def _schedule(recipe: TrainRecipe, optimizer: Optimizer, steps: int) -> Scheduler:
    """The learning rate as a function of the number of updates, warming up from zero."""
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        recipe.schedule.name,
        num_epochs=recipe.schedule.epochs,
        warmup_epochs=recipe.schedule.warmup_epochs,
        warmup_lr=0.0,
        min_lr=recipe.schedule.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    assert schedule is not None
    return schedule
