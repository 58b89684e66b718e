"""Does all of it work together: label and train on the demo's digits with the loader feeding the device?

Labeling and training are the commands that users type. How well the loader feeds a student, and its copies, are looked
at within the process (feeding.py, copies.py); several processes are in processes.py.
"""

import re
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from gpu_stages.pipeline.commands import (
    PYTHON,
    Command,
    Done,
    cores,
    label,
    label_words,
    labels,
    metrics,
    run,
    train_words,
)
from gpu_stages.pipeline.copies import copies
from gpu_stages.pipeline.feeding import feeding
from gpu_stages.pipeline.processes import two_processes
from gpu_stages.stage import COMPILER, Check, Outcome, Setting

# softshard.pipeline.views.loader stands for ffcv and numba, which it imports faster than they do by themselves
LOADER = ("softshard.pipeline.views.loader", "accelerate", "torchvision")
COMMANDS = (*LOADER, "psutil", "safetensors", "zarr", "obstore", "ruamel.yaml", "matplotlib")
VERIFIED = 256  # views that are labeled again


def checks(setting: Setting) -> list[Check]:
    triton = Check("train, branches in Triton", partial(training, form="triton"), (*COMMANDS, "triton", COMPILER), 400)
    return [
        Check("label", labeling, COMMANDS, 300),
        Check("train", training, COMMANDS, 400),
        Check("feeding the device at 224 px", feeding, LOADER, 240),
        Check("copies", copies, LOADER, 120),
        *([triton] if setting.device == "cuda" else []),
        Check("two processes", two_processes, COMMANDS, 420),
    ]


def labeling(setting: Setting) -> Outcome:
    """Label, look whether the store is whole, and label a sample of it again."""
    from softshard.pipeline.store.store import open_store

    path = setting.folder / "labels.zarr"
    shutil.rmtree(path, ignore_errors=True)
    done = label(setting, path)
    store = open_store(path)
    again = [*PYTHON, "softshard.pipeline", "verify", str(path), "--sample", str(VERIFIED), *label_words(setting)]
    verified = run(setting, again, 100)
    outcome = Outcome(
        {
            "images": store.manifest.samples,
            "views": store.manifest.views.count,
            "workers": cores(),
            "views_per_second": _last_number(r"([\d.]+)view/s", done.output),
            "estimated_views_per_second": _last_number(r"at (\d+) views/s", done.output),
            "seconds": done.seconds,
            "device_mib": done.mib,
            "bytes_per_view": round(store.bytes_per_view(), 2),
            "verified": _last_line(verified),
            "verify_seconds": verified.seconds,
        }
    )
    outcome.expect(verified.status == 0, f"verify ended with status {verified.status}: {_last_line(verified)}")
    return outcome


def training(setting: Setting, form: str = "auto") -> Outcome:
    """The demo's student on these labels, its branches in some form, stopped once in the middle."""
    from softshard.pipeline.cli import INTERRUPTED_STATUS
    from softshard.trainer.loop.run_folder import load_checkpoint

    folder = setting.folder / f"run_{form}"
    command = _train_command(setting, labels(setting), folder, form)
    shutil.rmtree(folder, ignore_errors=True)
    with Command(setting, command, 190, {}) as first:
        first.wait(lambda: bool(metrics(folder)))  # an epoch is over
        first.stop()
        first.wait()
        stopped = first.done().expect(INTERRUPTED_STATUS)
    before, checkpoint = metrics(folder), load_checkpoint(folder)
    assert checkpoint
    ended = run(setting, command, 190).expect()
    place = {name: checkpoint["progress"][name] for name in ("epoch", "step")}
    after = metrics(folder)
    outcome = Outcome(
        {"workers": cores(), "implementation": form, "stopped_at": place} | _figures(stopped, ended, after)
    )
    outcome.expect(len(before) < len(after), "it did not stop in the middle")
    outcome.expect(after[: len(before)] == before, "it began again")
    numbers = [line["epoch"] for line in after]
    outcome.expect(numbers == list(range(1, len(after) + 1)), f"it has trained the epochs {numbers}")
    outcome.expect(after[-1]["loss"] < after[0]["loss"], "the loss does not fall")
    return outcome


def _train_command(setting: Setting, store: Path, folder: Path, form: str) -> list[str]:
    command = [*PYTHON, *train_words(setting, store, folder), "--student.expand.implementation", form]
    command += ["--precision", "bf16"] if setting.device == "cuda" else []
    small = ["--student.model", "test_efficientnet", "--schedule.epochs", "3", "--batch_size", "64"]
    return command + (small if setting.tiny else [])


def _figures(stopped: Done, ended: Done, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median leaves the first epoch out, which finds the fastest kernels, and compiles some."""
    names = ("epoch", "loss", "images_per_second", "data_wait", "top1")
    medians = {
        name: statistics.median(line[name] for line in epochs[1:]) for name in ("images_per_second", "data_wait")
    }
    return medians | {
        "epochs": [{name: line[name] for name in names} for line in epochs],
        "seconds": [stopped.seconds, ended.seconds],
        "device_mib": None if ended.mib is None or stopped.mib is None else max(stopped.mib, ended.mib),
    }


def _last_number(pattern: str, output: str) -> float | None:
    found = re.findall(pattern, output)
    return float(found[-1]) if found else None


def _last_line(done: Done) -> str:
    lines = done.output.strip().splitlines() or [""]
    return lines[-1]
