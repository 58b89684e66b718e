"""Processes for tests of the label stage that take no time to start: forks of a server that has imported it already."""

import multiprocessing
import os
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pipeline.label", "workers"])


def start(recipe: Path, store: Path, processes: int, views: range | None = None) -> list[ForkServerProcess]:
    """Label with a recipe's file into a store, as a launcher starts several processes; their output is dropped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes} for rank in range(processes)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
    workers = [
        FORKS.Process(target=_label, args=(recipe, store, views, address | (place if address else {})))
        for place in places
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


def _label(recipe: Path, store: Path, views: range | None, variables: dict[str, object]) -> None:
    from pipeline.label import label
    from pipeline.recipe import LabelRecipe
    from pipeline.recipe_file import load_recipe

    os.environ.update({name: str(value) for name, value in variables.items()})
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        finished = label(load_recipe(LabelRecipe, recipe, [("store", str(store))]), views)
        os._exit(0 if finished else 1)
