"""The losses of updates, over all processes, and how fast the updates went by."""

from typing import Any

import torch
from torch import Tensor

from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.data.training_set import TrainingSet, rank_slice
from softshard.trainer.loop.checkpointer import Progress
from softshard.trainer.loop.checks import not_finite
from softshard.trainer.loop.progress import Clock, ProgressLog
from softshard.trainer.loop.train_state import TrainState

NAMES = ("loss", "hard_loss", "soft_loss")


class LossMeter:
    """Collects losses on their device, and reads them from time to time: reading waits for the device."""

    def __init__(
        self, state: TrainState, training: TrainingSet, loader: ViewLoader, progress: Progress, log: ProgressLog
    ) -> None:
        self._state, self._training, self._loader = state, training, loader
        self._progress, self._log = progress, log
        self._pending: list[Tensor] = []

    def start_epoch(self) -> None:
        """Show the epoch and start its clocks."""
        self._log.epoch(self._progress.epoch)
        self._clock, self._epoch_clock = Clock(self._loader), Clock(self._loader)

    def add(self, losses: Tensor) -> None:
        """Count an update: float32 [3], its total, hard and soft loss in this process."""
        self._pending.append(losses)
        for clock in (self._clock, self._epoch_clock):
            clock.count(self._state.recipe.batch_size)
        self._log.step()

    def read(self) -> None:
        """Add the pending losses, as means over all processes, to the progress, and log them.

        Raises:
            DataError: A loss or a weight is not finite.
        """
        progress = self._progress
        pending = torch.stack(self._pending)[None]
        gathered: Any = self._state.accelerator.gather(pending)
        losses: Tensor = gathered.cpu().double()  # [processes, updates, 3]
        first = progress.step - len(self._pending)
        self._pending = []
        self._check_finite(first, losses[..., 0])
        for row in losses.mean(dim=0).tolist():
            progress.sums = [total + loss for total, loss in zip(progress.sums, row, strict=True)]
        means = dict(zip(NAMES, losses.mean(dim=(0, 1)).tolist(), strict=True))
        update = progress.epoch * self._state.steps + progress.step
        self._log.losses(update, means | {"lr": self._state.lr} | self._clock.read())
        last = progress.step == self._state.steps
        if last or progress.step > self._state.recipe.logging.updates:  # an epoch begins with some waiting
            self._log.waiting(progress.epoch, self._epoch_clock.figures()["data_wait"])

    def epoch_figures(self) -> dict[str, Any]:
        """What metrics.jsonl says of the epoch that has just been trained, but for its validation."""
        progress = self._progress
        means = [total / self._state.steps for total in progress.sums]
        temperature = self._state.temperature((progress.epoch + 1) * self._state.steps - 1)
        view = self._training.view(progress.epoch)
        figures = {"epoch": progress.epoch + 1, "view": view, "lr": self._state.lr, "temperature": temperature}
        return figures | dict(zip(NAMES, means, strict=True)) | self._epoch_clock.figures()

    def _check_finite(self, first: int, losses: Tensor) -> None:
        """Raise DataError for losses [processes, updates] from step `first` on, or for weights, that are not finite."""
        bad = (~losses.isfinite()).T.nonzero()  # the earliest first
        if len(bad):
            number, rank = bad[0].tolist()
            what = f"a finite loss, found {float(losses[rank, number])}"
            raise self._not_finite(first + number, rank, what)
        if not self._state.is_finite():  # since the last update: the next one's loss would not have been finite
            what, rank = "finite weights after it, found others", self._state.accelerator.process_index
            raise self._not_finite(self._progress.step - 1, rank, what)

    def _not_finite(self, step: int, rank: int, what: str) -> DataError:
        recipe, accelerator, epoch = self._state.recipe, self._state.accelerator, self._progress.epoch
        order = self._training.order(recipe.seed, epoch)
        rows = rank_slice(order, recipe.batch_size, rank, accelerator.num_processes)[step]
        keys = [self._training.beton.manifest.keys[row] for row in rows]
        return not_finite(recipe, epoch, step, what, keys, accelerator.is_main_process)
