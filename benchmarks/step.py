"""What a step of training costs with stored soft labels: against hard labels, and against a teacher that runs along.

The student is that of configs/train/ghostnetv3_100.yaml with its optimizer, average and loss: plain, expanded, and
expanded with separate branches. Pixels are random, labels come from a small store of made-up codes. All sides of a
student share one state and take turns, in reversed order every other round. The tables show medians of the rounds
and medians of the ratios within a round, for CPU and for wall time of the process. The parts, all by default:

    labels    a step with soft labels, with a uniform tail and with a tail template, against one with hard labels: the
              whole step, which varies by some percent, as hard labels against themselves show, and what soft labels
              add, measured alone (gathering, decoding, the loss and its gradient, without those of hard labels). The
              goal is judged by both
    online    timm's LogitDistillationTask with DeiT-B (random weights), which labels each batch in the step. Against it
              our step with a tail template, alone and with its share of labeling the batch beforehand: the labels of a
              view serve all epochs that see it, of all students. Beside it, how many times it could be at most: if our
              step took no more than the student's forward and backward pass
    memory    of a process that takes steps, with and without the teacher; of one that uses a view of a store and reads
              the next one, and what comes on top of that
    start     from the command until the first step is done, through `accelerate launch` and `python -m`, on a few
              photographs

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
    STUDENTS,
    Step,
    labeling_step,
    labels_step,
    make_labels,
    make_teacher,
    make_training,
    online_step,
    passes_step,
    training_step,
)

EPOCHS = 600  # as the recipe
VIEWS, STUDENTS_SHARING = (600, 300, 50), (1, 3, 10)
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
    print(f"  {name:60}{size / MIB:9.0f}{f'{times:9.2f}' if times else '':9}  {verdict}", flush=True)


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
        whole = take_turns({name: training_step(training, kind) for name, kind in kinds.items()}, 2 * options.rounds)
        alone = take_turns({name: labels_step(training, kind) for name, kind in kinds.items()}, 100 * options.rounds)
        seconds = medians(float, whole["hard"])
        row(f"{student}, hard labels: seconds a step", seconds)
        more = {name: medians(lambda it, hard: 100 * (it / hard - 1), whole[name], whole["hard"]) for name in kinds}
        row(f"{student}, hard again: the whole step, so this is noise", more["hard again"])
        results[student] = {"hard, seconds": seconds, "whole step, %": more, "alone, %": {}}
        for name in labels:
            added = medians(lambda it, hard: 100 * (it - hard), alone[name], alone["hard"])
            added = {clock: added[clock] / seconds[clock] for clock in CLOCKS}
            results[student]["alone, %"][name] = added
            for what, found in (("the whole step", more[name]), ("what it adds, measured alone", added)):
                row(f"{student}, {name}: {what}", found, judged(max(found.values()) <= GOALS["labels"], "3 %"))
    return results


def measure_online(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    labels, teacher = make_labels(folder / "online", with_template=True), make_teacher(options.size)
    sides: dict[str, Step] = {}
    for student in STUDENTS:
        training = make_training(student, options.images, options.size)
        sides[student] = training_step(training, labels)
        sides[f"{student}, timm"] = online_step(training, teacher)
        sides[f"{student}, passes"] = passes_step(training)
        sides["labeling"] = labeling_step(training, teacher)
    times = take_turns(sides, options.rounds)
    results: dict[str, Any] = {name: medians(float, figures) for name, figures in times.items()}
    heading("online: seconds a step; how many times ours timm's task takes")
    row("labeling a batch beforehand: seconds", results["labeling"])
    for student in STUDENTS:
        results[f"{student}, times"] = report_online(student, times)
    return results


def report_online(student: str, times: Times) -> dict[str, dict[str, float]]:
    ours, online, labeling = times[student], times[f"{student}, timm"], times["labeling"]
    row(f"{student}: seconds", medians(float, ours))
    row(f"{student}, timm's task: seconds", medians(float, online))
    results = {"step": medians(lambda ours, online: online / ours, ours, online)}
    goal = GOALS.get(student)
    verdict = judged(results["step"]["cpu"] >= goal, f"{goal:g} x, CPU") if goal else "no goal"
    row(f"{student}: times", results["step"], verdict)
    passes = times[f"{student}, passes"]
    row("  the student's forward and backward pass alone: seconds", medians(float, passes))
    results["most"] = medians(lambda alone, teacher: 1 + teacher / alone, passes, labeling)
    row("  times, if nothing else took any time", results["most"])
    for views in VIEWS:
        for students in STUDENTS_SHARING:
            seen = EPOCHS // views
            name = f"with labeling, {views} views, each seen {seen} x, students: {students}"
            uses = seen * students
            results[name] = medians(lambda a, b, c, uses=uses: b / (a + c / uses), ours, online, labeling)
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
    """The figures of the process with the median peak, and of one that holds the template."""
    write_large_store(path, samples)
    found = sorted((in_fresh_process(reading_memory, path, False) for _ in range(rounds)), key=lambda one: one["peak"])
    figures, spread = found[rounds // 2], in_fresh_process(reading_memory, path, True)
    decoded, joined, limit = figures["decoded"], figures["joined"], GOALS["memory"]
    amount(f"the codes of one view of {samples} rows, decoded", decoded)
    amount("on top in any case: keys, checksums, rows of the join", joined)
    amount("on top with a template, when the loss is `spread`", spread["template"])
    figures |= {"template": spread["template"], "all": figures["peak"] + joined, "all, spread": spread["peak"] + joined}
    for key, name in (
        ("peak", "labels of one view in use and the next read"),
        ("all", "all of it without a template"),
        ("all, spread", "all of it with a template"),
    ):
        times = figures[key] / decoded
        amount(name, figures[key], times, judged(times < limit, f"below {limit:g}"))
    print(f"  seconds until the first view is there: {figures['seconds']:.2f}", flush=True)
    return figures


def measure_start(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    write_training_set(folder, 4 * options.images, options.size)
    results: dict[str, dict[str, float]] = {}
    heading("start: seconds until the first step is done")
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
    parser.add_argument("--images", type=int, default=16, help="of a batch")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=1281167, help="rows of the store whose views are read")
    parser.add_argument("--rounds", type=int, default=5)
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
