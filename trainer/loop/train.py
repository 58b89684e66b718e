"""The training loop: views and their stored soft labels in, a student out; the teacher is not here."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from softshard.pipeline.runtime.launch import StopSignal
from softshard.pipeline.views.batch import Batch
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.data.soft_labels import EpochLabels, LabelReader
from softshard.trainer.data.training_set import TrainingSet, open_training_set, rank_slice
from softshard.trainer.loop.checkpointer import Checkpointer, Progress
from softshard.trainer.loop.checks import check_batch, check_batch_norm, check_same_start, memory_advice
from softshard.trainer.loop.loss_meter import LossMeter
from softshard.trainer.loop.progress import ProgressLog, check_trackers
from softshard.trainer.loop.run_folder import check_run, make_run, run_lock
from softshard.trainer.loop.scores import train_accelerator
from softshard.trainer.loop.train_state import TrainState, make_train_state
from softshard.trainer.loop.validation import Validation, open_validation
from softshard.trainer.recipe import TrainRecipe


def train(recipe: TrainRecipe) -> bool:
    """Train to the end of the schedule, resuming with the batch after the run folder's newest checkpoint.

    Returns:
        False when a signal ended the work before.

    Raises:
        RecipeError, DataError, FormatError: Recipe, data, labels and run folder do not fit together, the loss is not
            finite, or memory does not suffice.
    """
    check_trackers(recipe)
    accelerator = _start_accelerator(recipe)
    training = open_training_set(recipe)
    _log_view_counts(recipe, training)
    with (
        run_lock(Path(recipe.output), accelerator),
        memory_advice(recipe, accelerator.device, accelerator.num_processes),
    ):
        if accelerator.is_main_process:
            make_run(recipe, training.beton.manifest.classes)
        accelerator.wait_for_everyone()
        check_run(recipe)
        finished = _load_and_train(accelerator, recipe, training)
        accelerator.wait_for_everyone()  # launchers end the others when the first one leaves: it may still be saving
    accelerator.state.destroy_process_group()
    return finished


def _start_accelerator(recipe: TrainRecipe) -> Accelerator:
    folder = Path(recipe.output)
    project = ProjectConfiguration(str(folder), str(folder / "tensorboard"))
    trackers = list(recipe.logging.trackers) or None
    accelerator = train_accelerator(recipe, "train", log_with=trackers, project_config=project)
    check_batch(recipe, accelerator.num_processes)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    logging.basicConfig(format="%(message)s")
    # one process says what the trainer's modules log: what expand did and what it left as it is
    logging.getLogger("softshard.trainer").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def _log_view_counts(recipe: TrainRecipe, training: TrainingSet) -> None:
    epochs, views = recipe.schedule.epochs, training.views.count
    if views < epochs:
        often = f"{epochs // views}" if epochs % views == 0 else f"{epochs // views} or {epochs // views + 1}"
        logging.getLogger(__name__).info("train: %d views for %d epochs: each is seen %s times", views, epochs, often)


def _load_and_train(accelerator: Accelerator, recipe: TrainRecipe, training: TrainingSet) -> bool:
    """Train what is left; False when a signal ended it."""
    state = make_train_state(accelerator, recipe, training.steps(recipe.batch_size))
    check_batch_norm(recipe, state.student, accelerator.num_processes)
    loader = _training_loader(state, training)
    validation = open_validation(accelerator, recipe, training, loader)
    checkpointer = Checkpointer(state, training.identity)
    progress, epochs = checkpointer.progress, recipe.schedule.epochs
    update = progress.epoch * state.steps + progress.step
    check_same_start(recipe, accelerator, update)
    is_left = progress.epoch < epochs
    if is_left:
        log = ProgressLog(accelerator, recipe, update, state.updates)
        with StopSignal() as signal, LabelReader(training.stores) as reader, log:
            meter = LossMeter(state, training, loader, progress, log)
            for epoch in range(progress.epoch, epochs):
                labels = reader.labels(training.view(epoch), training.view(min(epoch + 1, epochs - 1)))
                batches = _batches(state, training, loader, progress)
                meter.start_epoch()
                if not _train_epoch(state, batches, labels, meter, checkpointer, signal):
                    return False
                _end_epoch(state, validation, meter, checkpointer, log)
    checkpointer.save_result(trained=is_left)
    return True


def _training_loader(state: TrainState, training: TrainingSet) -> ViewLoader:
    recipe, accelerator = state.recipe, state.accelerator
    images = recipe.batch_size // (accelerator.num_processes * recipe.accumulation)
    size, workers = recipe.data.size, recipe.data.workers
    return ViewLoader(training.beton, training.views, size, images, workers, accelerator.device)


def _batches(state: TrainState, training: TrainingSet, loader: ViewLoader, progress: Progress) -> Iterator[Batch]:
    """This process's images of what is left of an epoch."""
    recipe, accelerator = state.recipe, state.accelerator
    order = training.order(recipe.seed, progress.epoch)
    rows = rank_slice(order, recipe.batch_size, accelerator.process_index, accelerator.num_processes)
    return loader.render(rows[progress.step :].reshape(-1), training.view(progress.epoch))


def _train_epoch(
    state: TrainState,
    batches: Iterator[Batch],
    labels: EpochLabels | None,
    meter: LossMeter,
    checkpointer: Checkpointer,
    signal: StopSignal,
) -> bool:
    """Train what is left of an epoch; False when a signal came, after which all is saved."""
    recipe, progress = state.recipe, checkpointer.progress
    first = progress.epoch * state.steps
    for losses in _updates(state, batches, labels, range(first + progress.step, first + state.steps)):
        progress.step += 1
        meter.add(losses)
        last = progress.step == state.steps
        stop, due = checkpointer.agree(signal.received, now=last)
        if stop or due or last or progress.step % recipe.logging.updates == 0:
            meter.read()
        if stop or (last and _is_validated(recipe, progress.epoch)) or (due and not last):
            checkpointer.save()  # before a validation, too, which takes long enough to be interrupted
        if stop:
            return False
    return True


def _updates(
    state: TrainState, batches: Iterator[Batch], labels: EpochLabels | None, updates: range
) -> Iterator[Tensor]:
    """Make the updates; yields for each its losses, float32 [3], as means over its parts, on the device."""
    state.model.train()
    for update in updates:
        state.begin(update)
        parts = []
        for batch in islice(batches, state.recipe.accumulation):
            temperature = state.temperature(update)
            soft = labels.soft(batch.rows, temperature, state.accelerator.device) if labels else []
            parts.append(torch.stack(state.learn(update, batch, soft)).detach())
        yield torch.stack(parts).mean(dim=0)


def _end_epoch(
    state: TrainState, validation: Validation, meter: LossMeter, checkpointer: Checkpointer, log: ProgressLog
) -> None:
    """Validate, keep the weights where they are the best so far, and write the epoch's metrics and a checkpoint."""
    recipe, epoch = state.recipe, checkpointer.progress.epoch
    figures, validated = meter.epoch_figures(), _is_validated(recipe, epoch)
    if validated:
        scores = validation.figures(state, folded=epoch + 1 == recipe.schedule.epochs)
        log.validated(epoch, (epoch + 1) * state.steps, scores)
        checkpointer.keep_best(scores)
        figures |= scores
    checkpointer.end_epoch(figures, validated)


def _is_validated(recipe: TrainRecipe, epoch: int) -> bool:
    return epoch + 1 == recipe.schedule.epochs or (epoch + 1) % recipe.evaluation.epochs == 0
