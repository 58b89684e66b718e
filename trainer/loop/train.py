"""The training loop: views and their stored soft labels in, a student out; the teacher is not here."""

import logging
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from softshard.pipeline.runtime.launch import CollectiveFlags, StopSignal
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.data.soft_labels import LabelReader
from softshard.trainer.data.training_set import TrainingSet, open_training_set, rank_slice
from softshard.trainer.loop.checks import check_batch, check_batch_norm, check_same_start, memory_advice, not_finite
from softshard.trainer.loop.curves import plot_curves
from softshard.trainer.loop.progress import Clock, ProgressLog, check_trackers
from softshard.trainer.loop.run_folder import (
    BEST,
    CURVES,
    WEIGHTS,
    alone,
    check_data,
    check_run,
    load_checkpoint,
    make_run,
    save_checkpoint,
    save_metrics,
    save_weights,
)
from softshard.trainer.loop.scores import train_accelerator
from softshard.trainer.loop.train_state import TrainState, make_train_state
from softshard.trainer.loop.validation import Validation, open_validation
from softshard.trainer.recipe import TrainRecipe


def train(recipe: TrainRecipe) -> bool:
    """Train to the end of the schedule, going on with the batch after the run folder's newest checkpoint; False when a
    signal ended the work before.

    Raises RecipeError, DataError and FormatError when recipe, data, labels and run folder do not fit together, when
    the loss is not finite, and when memory does not suffice.
    """
    check_trackers(recipe)
    folder = Path(recipe.output)
    project = ProjectConfiguration(str(folder), str(folder / "tensorboard"))
    accelerator = train_accelerator(
        recipe, "train", log_with=list(recipe.logging.trackers) or None, project_config=project
    )
    check_batch(recipe, accelerator.num_processes)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    _show_log(accelerator)
    training = open_training_set(recipe)
    _say_how_often_views_are_seen(recipe, training)
    with alone(folder, accelerator), memory_advice(recipe, accelerator.device, accelerator.num_processes):
        if accelerator.is_main_process:
            make_run(recipe, training.beton.manifest.classes)
        accelerator.wait_for_everyone()
        check_run(recipe)
        finished = _open(accelerator, recipe, training).finish()
        accelerator.wait_for_everyone()  # launchers end the others when the first one leaves: it may still be saving
    accelerator.state.destroy_process_group()
    return finished


def _show_log(accelerator: Accelerator) -> None:
    """Let one process say what the trainer's modules log: what expand did and what it left alone."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softshard.trainer").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)


def _say_how_often_views_are_seen(recipe: TrainRecipe, training: TrainingSet) -> None:
    epochs, views = recipe.schedule.epochs, training.views.count
    if views < epochs:
        often = f"{epochs // views}" if epochs % views == 0 else f"{epochs // views} or {epochs // views + 1}"
        logging.getLogger(__name__).info("train: %d views for %d epochs: each is seen %s times", views, epochs, often)


def _open(accelerator: Accelerator, recipe: TrainRecipe, training: TrainingSet) -> "_Run":
    learner = make_train_state(accelerator, recipe, training.steps(recipe.batch_size))
    check_batch_norm(recipe, learner.student, accelerator.num_processes)
    data, parts = recipe.data, accelerator.num_processes * recipe.accumulation
    loader = ViewLoader(
        training.beton, training.views, data.size, recipe.batch_size // parts, data.workers, accelerator.device
    )
    validation = open_validation(accelerator, recipe, training, loader)
    with accelerator.main_process_first():  # it removes what is damaged
        progress, checkpoint = _Progress(), load_checkpoint(Path(recipe.output))
    if checkpoint:
        check_data(Path(recipe.output), checkpoint, training.identity)
        learner.load_state_dict(checkpoint["learner"])
        progress = _Progress(**checkpoint["progress"])
    return _Run(accelerator, recipe, training, learner, loader, validation, progress)


@dataclass
class _Progress:
    """Where a run is: `step` updates into `epoch`, with the sums of their losses; `metrics` of finished epochs; the
    best top-1 so far."""

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0


@dataclass
class _Run:
    accelerator: Accelerator
    recipe: TrainRecipe
    training: TrainingSet
    learner: TrainState
    loader: ViewLoader
    validation: Validation
    progress: _Progress

    def __post_init__(self) -> None:
        self._folder, self._main = Path(self.recipe.output), self.accelerator.is_main_process
        self._steps, self._epochs = self.training.steps(self.recipe.batch_size), self.recipe.schedule.epochs
        self._pending: list[Tensor] = []  # losses of updates, on their device: looking at them makes it wait
        self._clock, self._epoch_clock = Clock(self.loader), Clock(self.loader)
        self._saved = time.monotonic()
        update = self.progress.epoch * self._steps + self.progress.step
        check_same_start(self.recipe, self.accelerator, update)
        self._watch = ProgressLog(self.accelerator, self.recipe, update, self.learner.updates)
        self._stop, self._agree = StopSignal(), CollectiveFlags(self.accelerator)
        self._reader = LabelReader(self.training.stores)

    def finish(self) -> bool:
        """Train what is left; False when a signal ended it."""
        trained = self.progress.epoch < self._epochs
        if trained:
            with self._stop, self._reader, self._watch:
                for epoch in range(self.progress.epoch, self._epochs):
                    if not self._train(epoch):
                        return False
                    self._validate(epoch)
        if self._main and (trained or not (self._folder / WEIGHTS).exists()):
            save_weights(self._folder / WEIGHTS, self.learner.result.network)
        return True

    def _train(self, epoch: int) -> bool:
        """What is left of an epoch; False when a signal came."""
        view, coming = self.training.view(epoch), self.training.view(min(epoch + 1, self._epochs - 1))
        labels = self._reader.labels(view, coming)
        rows = rank_slice(self.training.order(self.recipe.seed, epoch), self.recipe.batch_size, *self._place)
        batches = self.loader.render(rows[self.progress.step :].reshape(-1), view)
        self._watch.epoch(epoch)
        self.learner.model.train()
        self._clock, self._epoch_clock = Clock(self.loader), Clock(self.loader)
        for step in range(self.progress.step, self._steps):
            update = epoch * self._steps + step
            self.learner.begin(update)
            parts = []
            for batch in islice(batches, self.recipe.accumulation):
                temperature = self.learner.temperature(update)
                soft = labels.soft(batch.rows, temperature, self.accelerator.device) if labels else []
                parts.append(torch.stack(self.learner.learn(update, batch, soft)).detach())
            self._pending.append(torch.stack(parts).mean(dim=0))
            if not self._after(update):
                return False
        return True

    def _after(self, update: int) -> bool:
        """Count an update, look at its loss from time to time, and save when it is time; False when a signal came."""
        self.progress.step += 1
        for clock in (self._clock, self._epoch_clock):
            clock.count(self.recipe.batch_size)
        self._watch.step()
        last = self.progress.step == self._steps
        due = self._main and time.monotonic() - self._saved > 60 * self.recipe.checkpoint_minutes
        if due:
            self._saved = time.monotonic()  # asked for once, though it may be granted an update later
        stop, due = self._agree(self._stop.received, due, now=last)
        if stop or due or last or self.progress.step % self.recipe.logging.updates == 0:
            self._look(update)
        if stop or (last and self._is_validated(self.progress.epoch)) or (due and not last):
            self._save()  # before a validation, too, which takes long enough to be interrupted
        return not stop

    def _look(self, update: int) -> None:
        """Losses of the pending updates, as means over all processes: refused when not finite, summed, shown."""
        pending = torch.stack(self._pending)[None]
        losses: Tensor = self.accelerator.gather(pending).cpu().double()  # pyright: ignore  # [processes, updates, 3]
        first = self.progress.step - len(self._pending)
        self._pending = []
        self._check_finite(first, losses[..., 0])
        for total, hard, soft in losses.mean(dim=0).tolist():
            self.progress.sums = [a + b for a, b in zip(self.progress.sums, (total, hard, soft), strict=True)]
        means = dict(zip(("loss", "hard_loss", "soft_loss"), losses.mean(dim=(0, 1)).tolist(), strict=True))
        self._watch.losses(update + 1, means | {"lr": self.learner.lr} | self._clock.read())
        last = self.progress.step == self._steps
        if last or self.progress.step > self.recipe.logging.updates:  # an epoch begins with some waiting
            self._watch.waiting(self.progress.epoch, self._epoch_clock.figures()["data_wait"])

    def _check_finite(self, first: int, losses: Tensor) -> None:
        """Raise DataError for losses [processes, updates] from step `first` on, or for weights, that are not finite."""
        bad = (~losses.isfinite()).T.nonzero()  # the earliest first
        if len(bad):
            number, rank = bad[0].tolist()
            raise self._not_finite(first + number, rank, f"a finite loss, found {float(losses[rank, number])}")
        if not self.learner.is_finite():  # since the last update: the next one's loss would not have been finite
            what, rank = "finite weights after it, found others", self.accelerator.process_index
            raise self._not_finite(self.progress.step - 1, rank, what)

    def _not_finite(self, step: int, rank: int, what: str) -> Exception:
        order = self.training.order(self.recipe.seed, self.progress.epoch)
        rows = rank_slice(order, self.recipe.batch_size, rank, self.accelerator.num_processes)[step]
        keys = [self.training.beton.manifest.keys[row] for row in rows]
        return not_finite(self.recipe, self.progress.epoch, step, what, keys, self._main)

    def _validate(self, epoch: int) -> None:
        """End an epoch: its metrics, a checkpoint, the weights where they are the best so far."""
        last = epoch + 1 == self._epochs
        update = (epoch + 1) * self._steps
        means = [total / self._steps for total in self.progress.sums]
        figures = {"epoch": epoch + 1, "view": self.training.view(epoch), "lr": self.learner.lr}
        figures |= {"temperature": self.learner.temperature(update - 1)}
        figures |= dict(zip(("loss", "hard_loss", "soft_loss"), means, strict=True))
        figures |= self._epoch_clock.figures()
        lines = [*self.progress.metrics, figures]
        if self._is_validated(epoch):
            found = self.validation.figures(self.learner, folded=last)
            self._watch.validated(epoch, update, found)
            self._keep_best(found)
            figures |= found
            if self._main:
                plot_curves(lines, self.recipe.output, self._folder / CURVES)
        if self._main:
            save_metrics(self._folder, lines)
        self.progress = _Progress(epoch + 1, metrics=lines, best=self.progress.best)
        self._save()  # last: after a kill before it, all of this is done again

    def _is_validated(self, epoch: int) -> bool:
        return epoch + 1 == self._epochs or (epoch + 1) % self.recipe.evaluation.epochs == 0

    def _keep_best(self, figures: dict[str, float]) -> None:
        top1 = figures["ema_top1" if self.recipe.ema else "top1"]
        if top1 > self.progress.best:
            self.progress.best = top1
            if self._main:
                save_weights(self._folder / BEST, self.learner.result.network)

    def _save(self) -> None:
        if self._main:
            state = {"learner": self.learner.state_dict(), "progress": asdict(self.progress)}
            save_checkpoint(self._folder, state | {"data": self.training.identity})
        self._saved = time.monotonic()

    @property
    def _place(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes
