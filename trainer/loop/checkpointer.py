"""When a run is saved, and what: where it is, everything to resume from, the best weights and the last ones."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from softshard.pipeline.runtime.launch import CollectiveFlags
from softshard.trainer.loop.curves import plot_curves
from softshard.trainer.loop.run_folder import (
    BEST,
    CURVES,
    WEIGHTS,
    check_data,
    load_checkpoint,
    save_checkpoint,
    save_metrics,
    save_weights,
)
from softshard.trainer.loop.train_state import TrainState


@dataclass
class Progress:
    """Where a run is: `step` updates into `epoch`.

    `sums` are those of the updates' total, hard and soft losses, `metrics` the lines of finished epochs, `best` the
    best top-1 so far.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0


class Checkpointer:
    """Saves a run into its folder and restores it, at its newest checkpoint; all processes have one, the first writes.

    `progress` is where the run is.

    Args:
        state: What is saved, and restored when there is a checkpoint.
        data: TrainingSet.identity, which must be the same when a run resumes.

    Raises:
        DataError: The run began with other data.
        FormatError: No checkpoint is whole, or it is of another version.
    """

    def __init__(self, state: TrainState, data: dict[str, Any]) -> None:
        self._state, self._data = state, data
        self._folder, self._writes = Path(state.recipe.output), state.accelerator.is_main_process
        self._flags = CollectiveFlags(state.accelerator)
        self.progress = self._resume()
        self._saved = time.monotonic()

    def _resume(self) -> Progress:
        with self._state.accelerator.main_process_first():  # it removes what is damaged
            checkpoint = load_checkpoint(self._folder)
        if checkpoint is None:
            return Progress()
        check_data(self._folder, checkpoint, self._data)
        self._state.load_state_dict(checkpoint["learner"])
        return Progress(**checkpoint["progress"])

    def agree(self, signaled: bool, now: bool) -> tuple[bool, bool]:
        """Ask all processes whether to stop, and whether to save because `checkpoint_minutes` have passed.

        Args:
            signaled: A signal came to this process.
            now: Wait for the answer, which otherwise comes an update later, so that no process waits for another.
        """
        due = self._writes and time.monotonic() - self._saved > 60 * self._state.recipe.checkpoint_minutes
        if due:
            self._saved = time.monotonic()  # asked for once, though it may be granted an update later
        stop, due = self._flags(signaled, due, now=now)
        return stop, due

    def save(self) -> None:
        """Make a checkpoint."""
        if self._writes:
            checkpoint = {"learner": self._state.state_dict(), "progress": asdict(self.progress), "data": self._data}
            save_checkpoint(self._folder, checkpoint)
        self._saved = time.monotonic()

    def end_epoch(self, figures: dict[str, Any], validated: bool) -> None:
        """Write the figures of an epoch, move on to the next one, and make a checkpoint."""
        progress = self.progress
        progress.metrics.append(figures)
        if self._writes:
            if validated:
                plot_curves(progress.metrics, self._state.recipe.output, self._folder / CURVES)
            save_metrics(self._folder, progress.metrics)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.save()  # last: after a kill before it, all of this is done again

    def keep_best(self, figures: dict[str, float]) -> None:
        """Save the weights when their validation is the best so far."""
        top1 = figures["ema_top1" if self._state.recipe.ema else "top1"]
        if top1 > self.progress.best:
            self.progress.best = top1
            self._save_weights(BEST)

    def save_result(self, trained: bool) -> None:
        """Save the weights at the end; those of a run that had nothing left to train stay."""
        if trained or not (self._folder / WEIGHTS).exists():
            self._save_weights(WEIGHTS)

    def _save_weights(self, name: str) -> None:
        if self._writes:
            save_weights(self._folder / name, self._state.result.network)
