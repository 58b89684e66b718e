"""Those figures of step.py that need a process of their own: memory, and how soon a run makes its first step."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from loader import write_photographs
from step_sides import (
    CLASSES,
    CPU,
    ON_A_CPU,
    RECIPE,
    K,
    make_labels,
    make_teacher,
    make_training,
    online_step,
    training_step,
)
from store import BLOCK_ROWS, manifest, synthetic_logits

from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.manifest import text_digest
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe, ViewRecipe
from softshard.pipeline.store.store import create_store, open_store
from softshard.pipeline.store.topk import decode, encode, encode_template
from softshard.pipeline.views.golden import make_probes
from softshard.trainer.data.soft_labels import EpochLabels, LabelReader, Labels

VIEWS = ViewRecipe(seed=0, count=2)
BIN = Path(sys.executable).parent
ONE = ["--num_processes", "1", "--num_machines", "1", "--num_cpu_threads_per_process", "1", "--mixed_precision", "no"]
ONE += ["--dynamo_backend", "no", "-m"]
LAUNCHERS = {
    "accelerate launch -m": [str(BIN / "accelerate"), "launch", *ONE],
    "accelerate-launch -m": [str(BIN / "accelerate-launch"), *ONE],
    "python -m": [sys.executable, "-m"],
}
BATCH = 1024


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident(field: str) -> int:
    """Bytes: VmRSS, what is resident now, or VmHWM, its peak. (ru_maxrss of a new process is that of its parent.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def start_peak() -> int:
    """Let the peak start anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def training_memory(folder: Path, student: str, online: bool, images: int, size: int) -> int:
    """Bytes by which two steps of a student, and all they need, make this process grow at most."""
    torch.set_num_threads(1)
    before = start_peak()
    training = make_training(student, images, size)
    if online:
        step = online_step(training, make_teacher(size))
    else:
        step = training_step(training, make_labels(folder / f"{student}.zarr", with_template=True))
    step()
    step()
    return resident("VmHWM") - before


def write_labels(path: Path, keys: np.ndarray, crc32: np.ndarray, **changes: Any) -> None:
    """A store of two views and a template, with the codes of made-up logits, as often as needed."""
    logits = synthetic_logits().flatten(0, 1)
    codes, template = encode(logits, K), encode_template(logits[:, None]).numpy()
    shape = manifest(len(keys), CLASSES, K, BLOCK_ROWS, template=True).model_copy(update={"views": VIEWS, **changes})
    store = create_store(path, shape, keys, crc32)
    for block in range(store.blocks):
        rows = np.arange(store.rows(block).start, store.rows(block).stop)
        store.write_template(block, template[rows % len(template)])
        for view in range(VIEWS.count):
            store.write_block(view, block, codes[(rows + view) % len(codes)])


def write_large_store(path: Path, samples: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, samples, np.uint64)
    write_labels(path, keys, np.zeros(samples, np.uint32))


def reading_memory(path: Path, with_template: bool) -> dict[str, float]:
    """Peak growth of this process while one view of a store is used and the next one is read, beside the tail template
    where the labels are used with it."""
    torch.set_num_threads(1)
    store = open_store(path)
    rows = np.arange(store.manifest.samples)
    codes = store.read_block(0, 0)  # the libraries are loaded, their threads started
    decode(*codes[:BATCH].tensors(), CLASSES, 2.0)
    joined = store.keys.nbytes + store.crc32.nbytes + rows.nbytes
    before = start_peak()
    template = store.read_template() if with_template else None
    held, started = resident("VmRSS") - before, time.perf_counter()
    with LabelReader([Labels(store, rows, template, None, 1.0)]) as reader:
        decoded = use(reader.labels(0, 1))
        seconds = time.perf_counter() - started
        for view, coming in ((1, 1), (1, 0), (0, 1)):
            use(reader.labels(view, coming))
    peak = resident("VmHWM") - before
    return {"decoded": decoded, "joined": joined, "template": held, "peak": peak, "seconds": seconds}


def use(labels: EpochLabels | None) -> int:
    """Take some random batches; returns the bytes of the view's codes."""
    assert labels
    [(part, codes)] = labels.parts
    for batch in np.random.default_rng(0).integers(0, len(part.rows), (200, BATCH)):
        labels.soft(batch, 2.0, CPU)
    return codes.index.nbytes + codes.gap.nbytes + codes.tail.nbytes


def write_training_set(folder: Path, images: int, size: int) -> None:
    """Packed photographs and a store for them."""
    write_photographs(folder / "images", images)
    (folder / "classes.txt").write_text("\n".join(["all", *(f"class {number}" for number in range(1, CLASSES))]))
    source = SourceRecipe(kind="imagefolder", path=str(folder / "images"))
    pack(PackRecipe(source=source, classes=str(folder / "classes.txt"), output=str(folder / "train.beton")))
    beton = open_beton(folder / "train.beton")
    probes = make_probes(beton, VIEWS, size)
    digest = text_digest(beton.manifest.classes)
    write_labels(folder / "labels.zarr", beton.keys, beton.crc32, class_list_digest=digest, probes=probes)


def time_to_first_step(launcher: str, folder: Path, images: int, size: int) -> tuple[float, float]:
    """(wall, CPU) seconds from the launch until the live line shows the loss of the first step. One thread, whatever
    the launcher's own default."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    data = {"train": folder / "train.beton", "validation": folder / "train.beton", "labels": folder / "labels.zarr"}
    changes = dict(ON_A_CPU) | {f"data.{name}": str(path) for name, path in data.items()}
    changes |= {"data.size": str(size), "data.workers": "1", "batch_size": str(images)}
    changes |= {"logging.updates": "1", "output": str(run)}
    command = [*LAUNCHERS[launcher], "softshard.trainer", "train", "--config", str(RECIPE)]
    command += [word for name, value in changes.items() for word in (f"--{name}", value)]
    started, shown = time.perf_counter(), folder / "log.txt"
    with shown.open("w") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        process = psutil.Popen(command, start_new_session=True, stdout=log, stderr=log, env=one_thread)
    while "loss=" not in shown.read_text():
        if process.poll() is not None:
            raise RuntimeError(shown.read_text())
        time.sleep(0.01)
    wall = time.perf_counter() - started
    cpu = sum(sum(part.cpu_times()[:2]) for part in (process, *process.children(recursive=True)))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return wall, cpu
