"""Two processes make the store that one makes, and learn what one learns."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gpu_stages.pipeline.commands import PYTHON, label, labels, launcher, metrics, run, train_words
from gpu_stages.stage import Outcome, Setting, Skipped

# Batches are the same whatever the number of processes, and so are labels on equal GPUs; this is for unequal ones.
CODES_THAT_MAY_DIFFER = 0.01
# Relative, of losses and of all weights together, after a few updates. Sums over half a batch are rounded in another
# way, which on a CPU makes 1e-7 of both; without the exchange of gradients it would be 5e-3.
LOSSES_MAY_DIFFER, WEIGHTS_MAY_DIFFER = 1e-4, 5e-4
# Batch norm's statistics are those of a process's part of a batch: only without it two processes equal one.
STUDENT = "{model: test_convnext, num_classes: 10}"
BATCH = 256
# TF32 has 11 bits, and a kernel that uses it may be the fastest for one size of a batch alone; threads add up in parts.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}


def two_processes(setting: Setting) -> Outcome:
    if setting.device == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs, found one")
    outcome = Outcome()
    _compare_labels(setting, outcome)
    _compare_training(setting, outcome)
    return outcome


def _compare_labels(setting: Setting, outcome: Outcome) -> None:
    """On a CPU byte for byte; on GPUs code by code."""
    one, two = labels(setting), setting.folder / "labels_of_two.zarr"
    shutil.rmtree(two, ignore_errors=True)
    done = label(setting, two, processes=2)
    stores = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} for root in (one, two)
    ]
    files = [name for name in stores[0].keys() | stores[1].keys() if stores[0].get(name) != stores[1].get(name)]
    total, codes = _codes_that_differ(one, two)
    found = {"files": len(stores[0]), "files_that_differ": len(files), "views": total, "codes_that_differ": codes}
    outcome.figures["labels"] = found | {"seconds": done.seconds}
    if setting.device == "cpu":
        outcome.expect(not files, f"labels: {len(files)} files of the store differ, such as {files[:3]}")
    outcome.expect(codes <= CODES_THAT_MAY_DIFFER * total, f"labels: {codes} of {total} differ")
    outcome.expect("2 processes" in done.output, "labels: not two processes")


def _codes_that_differ(one: Path, two: Path) -> tuple[int, int]:
    """How many labels there are, and how many of them are not the same in both stores."""
    from softshard.pipeline.store.store import open_store

    left, right = open_store(one), open_store(two)
    total = differ = 0
    for view in range(left.manifest.views.count):
        a, b = left.read_view(view), right.read_view(view)
        same = (a.index == b.index).all(axis=1) & (a.gap == b.gap).all(axis=1) & (a.tail == b.tail)
        total, differ = total + len(same), differ + int((~same).sum())
    return total, differ


def _compare_training(setting: Setting, outcome: Outcome) -> None:
    """The same global batches, gradients that are means over both: the same losses and weights, but for rounding."""
    import safetensors.torch

    folders = [_train(setting, processes) for processes in (1, 2)]
    one, two = (metrics(folder) for folder in folders)
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True))
    a, b = (safetensors.torch.load_file(folder / "model.safetensors") for folder in folders)
    weights = _norm([a[name] - b[name] for name in a]) / _norm(a.values())
    names = ("loss", "images_per_second", "data_wait")
    epochs = {
        key: [{name: line[name] for name in names} for line in lines] for key, lines in (("one", one), ("two", two))
    }
    outcome.figures["training"] = {"batch": BATCH, "losses_off": losses, "weights_off": weights} | epochs
    outcome.expect(losses <= LOSSES_MAY_DIFFER, f"training: losses are {losses:.2g} off")
    outcome.expect(weights <= WEIGHTS_MAY_DIFFER, f"training: weights are {weights:.2g} off")


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _train(setting: Setting, processes: int) -> Path:
    """Two epochs, of a few updates each, in some processes."""
    folder = setting.folder / f"run_of_{processes}"
    shutil.rmtree(folder, ignore_errors=True)
    start = launcher(processes) if processes > 1 else PYTHON
    command = [*start, *train_words(setting, labels(setting), folder), "--student", STUDENT]
    command += ["--optimizer", "{name: sgd, lr: 0.05}", "--schedule", "{epochs: 2}", "--batch_size", str(BATCH)]
    run(setting, command, 100, **EXACT).expect()
    return folder
