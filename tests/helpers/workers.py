"""Processes for tests of the stages that take no time to start: forks of a server that has imported them already."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["softshard.pipeline.labels.label", "softshard.trainer.loop.train", "matplotlib.figure", "helpers.workers"]
)
Work = Callable[[], bool]  # whether it finished
Context = AbstractContextManager[None]
STOPPED = 130  # the exit status of work that a signal ended, as at the command line; 1: an exception


def labeling(recipe: Path, store: Path, views: range | None = None) -> Work:
    """Label with a recipe's file into a store."""
    return partial(_label, recipe, store, views)


def training(recipe: Path, *changes: tuple[str, str], within: Callable[[], Context] = nullcontext) -> Work:
    """Train with a recipe's file and overrides, within a context of the new process."""
    return partial(_train, recipe, changes, within)


def start(work: Work, processes: int, **variables: object) -> list[ForkServerProcess]:
    """Do some work as a launcher starts it in several processes, with more variables; their output is dropped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes} for rank in range(processes)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
    workers = [
        FORKS.Process(target=_run, args=(work, address | (place if address else {}) | variables)) for place in places
    ]
    for worker in workers:
        worker.start()
    return workers


def kill(workers: list[ForkServerProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def finish(workers: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Exit statuses; None for a process that had not ended in time and was killed."""
    for worker in workers:
        worker.join(seconds)
    codes = [worker.exitcode for worker in workers]
    kill(workers)
    return codes


def _run(work: Work, variables: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        os._exit(0 if work() else STOPPED)


def _label(recipe: Path, store: Path, views: range | None) -> bool:
    from softshard.pipeline.labels.label import label
    from softshard.pipeline.recipes.recipe import LabelRecipe
    from softshard.pipeline.recipes.yaml_file import load_recipe

    return label(load_recipe(LabelRecipe, recipe, [("store", str(store))]), views)


def _train(recipe: Path, changes: tuple[tuple[str, str], ...], within: Callable[[], Context]) -> bool:
    import torch

    from softshard.pipeline.recipes.yaml_file import load_recipe
    from softshard.trainer.loop.train import train
    from softshard.trainer.recipe import TrainRecipe

    torch.set_num_threads(1)
    with within():
        return train(load_recipe(TrainRecipe, recipe, changes))
