"""What a run shows while it trains: one live line, and the trackers."""

import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from softshard.pipeline.runtime.documents import flatten
from softshard.pipeline.runtime.errors import RecipeError
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.recipe import TrainRecipe

LARGEST_WAIT = 0.1  # a larger fraction of the time spent waiting for images is said
SECONDS_WITHOUT_TERMINAL = 10.0
SHOWN = (("top1", "top-1"), ("top5", "top-5"), ("agreement", "agreement"))


def check_trackers(recipe: TrainRecipe) -> None:
    """Check the recipe's trackers.

    Raises:
        RecipeError: Accelerate does not know one, or its package is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    for name in recipe.logging.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(
                f"logging.trackers: expected trackers of Accelerate ({', '.join(LOGGER_TYPE_TO_CLASS)}), found {name!r}"
            )
        if name not in installed:
            raise RecipeError(
                f"logging.trackers: expected {name} to be installed, found that it is not; pip install it"
            )


class ProgressLog:
    """The live line and the trackers of a run; every process has one, the first one shows."""

    def __init__(self, accelerator: Accelerator, recipe: TrainRecipe, update: int, updates: int) -> None:
        self._accelerator, self._recipe = accelerator, recipe
        self._update, self._updates = update, updates
        self._shows, self._warned = accelerator.is_main_process, False

    def __enter__(self) -> "ProgressLog":
        self._bar = tqdm(
            desc=self._recipe.output,
            total=self._updates,
            initial=self._update,
            unit="step",
            disable=not self._shows,
            mininterval=0.2 if sys.stderr.isatty() else SECONDS_WITHOUT_TERMINAL,
        )
        # of updates that are done again after a crash, TensorBoard forgets what it has seen
        options = {"tensorboard": {"purge_step": self._update + 1}}
        self._accelerator.init_trackers(Path(self._recipe.output).name, init_kwargs=options)
        for tracker in self._accelerator.trackers:
            if self._update == 0 or tracker.name != "tensorboard":  # it would show a run of its own for the recipe
                tracker.store_init_configuration(_flat(self._recipe.model_dump(mode="json")))
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def step(self) -> None:
        """Count an update on the live line."""
        self._bar.update()

    def epoch(self, epoch: int) -> None:
        """Name an epoch, counted from 0, on the live line."""
        self._bar.set_description(f"{self._recipe.output} epoch {epoch + 1}/{self._recipe.schedule.epochs}")

    def losses(self, update: int, figures: dict[str, float]) -> None:
        """Show means over the last few updates, and log them."""
        shown = {"loss": f"{figures['loss']:.3f}"}
        if figures["soft_loss"] and figures["hard_loss"]:
            shown |= {"hard": f"{figures['hard_loss']:.3f}", "soft": f"{figures['soft_loss']:.3f}"}
        shown |= {"img/s": f"{figures['images_per_second']:.0f}", "wait": f"{figures['data_wait']:.0%}"}
        self._bar.set_postfix(shown)
        self.log("train", update, figures)

    def validated(self, epoch: int, update: int, figures: dict[str, float]) -> None:
        """Say what a validation found, and log it."""
        self.say("; ".join([f"epoch {epoch + 1}", *_words(figures)]))
        self.log("validation", update, figures)

    def waiting(self, epoch: int, fraction: float) -> None:
        """Say, once, when training waits for images, from what the epoch has shown so far."""
        if fraction > LARGEST_WAIT and not self._warned:
            self._warned = True
            self.say(
                f"epoch {epoch + 1}: {fraction:.0%} of the time went into waiting for images; raise data.workers "
                f"({self._recipe.data.workers}), pack with a smaller max_side, or label views with dct_scaling: true"
            )

    def say(self, text: str) -> None:
        """Write a line above the live one."""
        if self._shows:
            tqdm.write(text, file=sys.stderr)

    def log(self, group: str, update: int, figures: dict[str, float]) -> None:
        """Give figures to the trackers, as group/name."""
        self._accelerator.log({f"{group}/{name}": value for name, value in figures.items()}, step=update)


class Clock:
    """How fast images of a loader went by since the clock was last read, and how long they were waited for."""

    def __init__(self, loader: ViewLoader) -> None:
        self._loader = loader
        self._start()

    def _start(self) -> None:
        self._started, self._waited, self._images = time.perf_counter(), self._loader.waited, 0

    def count(self, images: int) -> None:
        """Count images of the global batch."""
        self._images += images

    def figures(self) -> dict[str, float]:
        """Images a second, and the fraction of the time spent waiting for them."""
        seconds, waited = time.perf_counter() - self._started, self._loader.waited - self._waited
        return {"images_per_second": self._images / seconds, "data_wait": waited / seconds}

    def read(self) -> dict[str, float]:
        """The figures; the clock starts anew."""
        figures = self.figures()
        self._start()
        return figures


def _words(figures: dict[str, float]) -> list[str]:
    """Put figures into words: ['weights: top-1 71.20 %, top-5 90.31 %, agreement 80.12 %', 'average: ...']."""
    words = []
    for prefix, name in (("", "weights"), ("ema_", "average"), ("folded_", "folded")):
        found = [(label, figures.get(prefix + key)) for key, label in SHOWN]
        shown = ", ".join(f"{label} {value:.2f} %" for label, value in found if value is not None)
        words += [f"{name}: {shown}"] if shown else []
    return words


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested sections as `section.key`, with values that every tracker takes."""
    leaves = flatten(values).items()
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in leaves}
