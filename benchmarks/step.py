"""What a step of training costs with stored soft labels: against hard labels, and against a teacher that runs along.

The student is that of configs/train/ghostnetv3_100.yaml with its optimiser, average and loss: plain, expanded, and
expanded with separate branches. Pixels are random, labels come from a small store of made-up codes. All sides of a
student share one learner and take turns, in reversed order every other round. The tables show medians of the rounds
and medians of the ratios within a round, for CPU and for wall time of the process. The parts, all by default:

    labels    a step with soft labels, with a uniform tail and with a tail template, against one with hard labels. Whole
              steps vary by some percent, as hard labels against themselves show; the goal is judged by what soft
              labels add, measured alone: gathering, decoding, the loss and its gradient, without those of hard labels
    online    timm's LogitDistillationTask with DeiT-B (random weights), which labels each batch in the step. Against it
              our step, alone and with its part of labelling the batch beforehand, which several students share, and
              the epochs that see a view again
    memory    of a process that takes steps, with and without the teacher; of one that uses a view and reads the next
    start     from `accelerate launch` until the first step is done and saved, on a few photographs

`--json PATH` writes the figures.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from step_processes import (
    LAUNCHERS,
    in_fresh_process,
    reading_memory,
    time_to_first_step,
    training_memory,
    write_large_store,
    write_training_set,
)
from step_sides import (
    CLASSES,
    STUDENTS,
    Step,
    labelling_step,
    labels_step,
    learner_step,
    make_labels,
    make_teacher,
    make_training,
    online_step,
)

EPOCHS, STUDENTS_SHARING = 300, (1, 3, 10)
GOALS = {"labels": 3.0, "plain": 8.0, "expanded": 6.0, "start": 15.0, "memory": 3.0}
CLOCKS, MIB = ("cpu", "wall"), 2**20
Times = dict[str, list[tuple[float, float]]]  # (CPU, wall) seconds of each round, by side


def take_turns(sides: dict[str, Step], rounds: int) -> Times:
    times: Times = {name: [] for name in sides}
    for step in sides.values():
        step()
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            cpu, wall = time.process_time(), time.perf_counter()
            sides[name]()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def medians(function: Callable[..., float], *sides: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The median over the rounds of a function of the sides' seconds, for each clock."""
    return {
        clock: statistics.median(
            function(*(times[number] for times in figures)) for figures in zip(*sides, strict=True)
        )
        for number, clock in enumerate(CLOCKS)
    }


def heading(text: str) -> None:
    print(f"{text:62}{'CPU':>9}{'wall':>9}")


def row(name: str, figures: dict[str, float], verdict: str = "") -> None:
    print(f"  {name:60}" + "".join(f"{figures[clock]:9.3f}" for clock in CLOCKS) + f"  {verdict}", flush=True)


def amount(name: str, size: float, times: float | None = None, verdict: str = "") -> None:
    print(f"  {name:60}{size / MIB:9.0f}{'' if times is None else f'{times:9.2f}'}  {verdict}", flush=True)


def judged(reached: bool, goal: str) -> str:
    return f"goal {goal}: {'reached' if reached else 'MISSED'}"


def measure_labels(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    tails = {"uniform tail": False, "template tail": True}
    labels = {name: make_labels(folder / name, with_template) for name, with_template in tails.items()}
    kinds = {"hard": None, "hard again": None, **labels}
    results: dict[str, Any] = {}
    heading("labels: % more than a step with hard labels")
    for student in ("plain", "expanded"):
        training = make_training(student, options.images, options.size)
        whole = take_turns({name: learner_step(training, kind) for name, kind in kinds.items()}, 2 * options.rounds)
        alone = take_turns({name: labels_step(training, kind) for name, kind in kinds.items()}, 100 * options.rounds)
        seconds = medians(float, whole["hard"])
        row(f"{student}, hard labels: seconds a step", seconds)
        more = {name: medians(lambda it, hard: 100 * (it / hard - 1), whole[name], whole["hard"]) for name in kinds}
        for name in ("hard again", *labels):
            row(f"{student}, {name}: the whole step", more[name])
        results[student] = {"hard, seconds": seconds, "whole step, %": more, "alone, %": {}}
        for name in labels:
            added = medians(lambda it, hard: 100 * (it - hard), alone[name], alone["hard"])
            added = {clock: added[clock] / seconds[clock] for clock in CLOCKS}
            results[student]["alone, %"][name] = added
            row(f"{student}, {name}: what it adds", added, judged(max(added.values()) <= GOALS["labels"], "3 %"))
    return results


def measure_online(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    labels, teacher = make_labels(folder / "online", with_template=False), make_teacher()
    sides: dict[str, Step] = {}
    for student in STUDENTS:
        training = make_training(student, options.images, options.size)
        sides[student] = learner_step(training, labels)
        sides[f"{student}, timm"] = online_step(training, teacher)
        sides["labelling"] = labelling_step(training, teacher)
    times = take_turns(sides, options.rounds)
    results: dict[str, Any] = {name: medians(float, figures) for name, figures in times.items()}
    heading("online: seconds a step; how many times ours timm's task takes")
    row("labelling a batch beforehand: seconds", results["labelling"])
    for student in STUDENTS:
        results[f"{student}, times"] = report_online(student, times)
    return results


def report_online(student: str, times: Times) -> dict[str, dict[str, float]]:
    ours, online, labelling = times[student], times[f"{student}, timm"], times["labelling"]
    row(f"{student}: seconds", medians(float, ours))
    row(f"{student}, timm's task: seconds", medians(float, online))
    results = {"step": medians(lambda ours, online: online / ours, ours, online)}
    goal = GOALS.get(student)
    verdict = judged(results["step"]["cpu"] >= goal, f"{goal:g} x, CPU") if goal else "no goal"
    row(f"{student}: times", results["step"], verdict)
    for views in (EPOCHS, EPOCHS // 6):
        for students in STUDENTS_SHARING:
            uses = students * EPOCHS // views
            name = f"with labelling, {views} views, {EPOCHS} epochs, students: {students}"
            results[name] = medians(lambda a, b, c, uses=uses: b / (a + c / uses), ours, online, labelling)
            row(f"  {name}", results[name])
    return results


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"{'memory: by how many MiB a new process grows at most':62}{'MiB':>9}{'times':>9}")
    for student in ("plain", "expanded"):
        ours, online = (
            in_fresh_process(training_memory, folder, student, online, options.images, options.size)
            for online in (False, True)
        )
        results[student] = {"ours": ours, "timm": online}
        amount(student, ours)
        amount(f"{student}, timm's task", online, online / ours)
    return results | {"reading": measure_reading(folder / "large.zarr", options.samples, options.rounds)}


def measure_reading(path: Path, samples: int, rounds: int) -> dict[str, float]:
    """The figures of the process with the median peak."""
    write_large_store(path, samples)
    found = sorted((in_fresh_process(reading_memory, path) for _ in range(rounds)), key=lambda one: one["peak"])
    figures = found[rounds // 2] | {"template": samples * CLASSES}
    ratio, limit = figures["peak"] / figures["decoded"], GOALS["memory"]
    amount(f"the codes of one view of {samples} rows, decoded", figures["decoded"])
    amount(
        "using one view while the next one is read", figures["peak"], ratio, judged(ratio < limit, f"below {limit:g}")
    )
    amount("beside it, in any case: keys, checksums, rows", figures["joined"])
    amount("beside it, with a template: a byte for each class and row", figures["template"])
    print(f"  seconds until the first view is there: {figures['seconds']:.2f}", flush=True)
    return figures


def measure_start(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    write_training_set(folder, 4 * options.images, options.size)
    results: dict[str, dict[str, float]] = {}
    heading("start: seconds until the first step is done and saved")
    for launcher in LAUNCHERS:
        times = [time_to_first_step(launcher, folder, options.images, options.size) for _ in range(1 + options.rounds)]
        results[launcher] = medians(float, [(cpu, wall) for wall, cpu in times[1:]])
        goal = judged(results[launcher]["wall"] < GOALS["start"], f"below {GOALS['start']:g} s")
        row(f"{launcher} trainer train", results[launcher], goal)
    return results


PARTS = {"labels": measure_labels, "online": measure_online, "memory": measure_memory, "start": measure_start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=1281167, help="rows of the store whose views are read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"images": options.images, "size": options.size, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            results[name] = PARTS[name](Path(folder), options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
