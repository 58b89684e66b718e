"""Latency of students on one thread, one image at a time: with and without their branches, in every exported format."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import atomic_path, write_atomically
from softshard.trainer.export.formats import FORMATS, chosen_formats
from softshard.trainer.export.formats.contract import Job, Predictor
from softshard.trainer.export.formats.folder import load_folder
from softshard.trainer.export.manifest import Cost, cost_of, open_exported
from softshard.trainer.recipe import StudentRecipe
from softshard.trainer.students import build_student, expand

Form = Literal["unfolded", "folded"]
WARM_UP = 3
MARKERS = {"torch": "o", "onnx": "s", "int8": "^", "executorch": "D", "coreml": "v"}


@dataclass(frozen=True)
class Side:
    """What is measured: a student in one form and one format."""

    student: str
    form: Form
    format: str  # torch: eager
    cost: Cost
    bytes: int | None  # of its file; torch has none
    predict: Predictor  # on one thread


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image, in each round."""

    side: Side
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.rounds)

    @property
    def p90(self) -> float:
        """The 90th percentile, in milliseconds."""
        return sorted(self.rounds)[int(0.9 * len(self.rounds))]


def latency(folder: Path, rounds: int) -> list[Latency]:
    """Measure an exported folder; the unfolded student is built again, with the weights that it starts from.

    Args:
        folder: what `export` wrote.
        rounds: how often each side is measured.

    Raises:
        DataError: the folder is no export, a file of it is gone, packages of its formats are not installed, or there
            are no rounds.
    """
    if rounds < 1:
        raise DataError(f"--rounds: expected at least 1, found {rounds}; 50 give a steady median")
    exported = open_exported(folder)
    student, size = exported.student, exported.preprocessing.size
    chosen = chosen_formats(list(exported.formats), student.library)
    files = {name: folder / FORMATS[name].file for name in chosen}
    for name, path in files.items():
        if not path.exists():
            raise DataError(f"{path}: expected the {name} file of this export, found none; export again")
    sides = sides_of(student.model, "folded", load_folder(folder), size, files)
    with tempfile.TemporaryDirectory() as temporary:
        if student.expand:
            network, unfolded = unfolded_network(student, size), {}
            if "onnx" in chosen:
                unfolded["onnx"] = Path(temporary) / FORMATS["onnx"].file
                job = Job(network, student.model, exported.preprocessing, exported.label_names, list)
                FORMATS["onnx"].write(job, unfolded["onnx"])
            sides = sides_of(student.model, "unfolded", network, size, unfolded) + sides
        return measure(sides, size, rounds)


def unfolded_network(student: StudentRecipe, size: int) -> nn.Module:
    """Build a student as it starts to train, in evaluation mode, its weights from a fixed seed."""
    assert student.expand is not None
    torch.manual_seed(0)
    plain = build_student(student.model, student.num_classes, library=student.library)
    return expand(plain, torch.zeros(1, 3, size, size), **student.expand.model_dump()).eval()


def sides_of(student: str, form: Form, network: nn.Module, size: int, files: Mapping[str, Path]) -> list[Side]:
    """List a network in eager mode, and the same in the files that this system can run, {format: path}."""
    cost = cost_of(network, size)
    sides = [Side(student, form, "torch", cost, None, network.eval())]
    for name, path in files.items():
        load = FORMATS[name].load
        if load:
            sides.append(Side(student, form, name, cost, path.stat().st_size, load(path, 1)))
    return sides


@torch.inference_mode()
def measure(sides: Sequence[Side], size: int, rounds: int) -> list[Latency]:
    """Time one image of noise in each round for each side, on one thread.

    Sides take turns, so that what else the machine does falls on all of them. One image before it, which is not timed,
    brings the side's weights back into the caches.
    """
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[] for _ in sides]
    with _one_thread():
        for number in tqdm(range(-WARM_UP, rounds), "latency", unit="round"):
            for side, found in zip(sides, times, strict=True):
                side.predict(image)
                started = time.perf_counter()
                side.predict(image)
                if number >= 0:
                    found.append(1000 * (time.perf_counter() - started))
    return [Latency(side, tuple(found)) for side, found in zip(sides, times, strict=True)]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speedup(slower: Latency, faster: Latency) -> float:
    """Return the median over the rounds of the first one's time divided by the second one's."""
    return statistics.median(a / b for a, b in zip(slower.rounds, faster.rounds, strict=True))


def ratios(latencies: Sequence[Latency]) -> list[tuple[str, str, float]]:
    """Compare folded with unfolded in each format, and int8 with ONNX in float32.

    Returns:
        (student, comparison, times as fast) for each.
    """
    found = {(each.side.student, each.side.form, each.side.format): each for each in latencies}
    result = []
    for (student, form, name), each in found.items():
        unfolded, exact = found.get((student, "unfolded", name)), found.get((student, "folded", "onnx"))
        if form == "folded" and unfolded:
            result.append((student, f"{name}, folded against unfolded", speedup(unfolded, each)))
        if name == "int8" and exact:
            result.append((student, "int8 against onnx", speedup(exact, each)))
    return result


def table(latencies: Sequence[Latency]) -> str:
    """Render a Markdown table, with the comparisons below it."""
    lines = [
        "| student | form | format | parameters | MACs, millions | bytes | median ms | p90 ms |",
        "| ------- | ---- | ------ | ---------: | -------------: | ----: | --------: | -----: |",
    ]
    for each in latencies:
        side = each.side
        size = "" if side.bytes is None else f"{side.bytes:,}"
        lines.append(
            f"| {side.student} | {side.form} | {side.format} | {side.cost.parameters:,} | {side.cost.macs / 1e6:.1f} "
            f"| {size} | {each.median:.2f} | {each.p90:.2f} |"
        )
    compared = [f"{student}: {what}: {times:.2f} x as fast" for student, what, times in ratios(latencies)]
    return "\n".join([*lines, "", *compared])


def save_json(latencies: Sequence[Latency], path: Path) -> None:
    """Write the table as JSON, with the milliseconds of all rounds."""
    rows = [
        {
            **{name: getattr(each.side, name) for name in ("student", "form", "format", "bytes")},
            **each.side.cost.model_dump(),
            "median": each.median,
            "p90": each.p90,
            "rounds": each.rounds,
        }
        for each in latencies
    ]
    write_atomically(path, json.dumps(rows, indent=2).encode())


def plot(latencies: Sequence[Latency], path: Path) -> None:
    """Plot median latency against MACs as a PNG, a line from each unfolded student (hollow) to the folded (filled)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    students = list(dict.fromkeys(each.side.student for each in latencies))
    for student in students:
        for name in MARKERS:
            points = [each for each in latencies if (each.side.student, each.side.format) == (student, name)]
            _plot_points(axes, points, f"C{students.index(student)}", f"{student}, {name}")
    axes.set(xscale="log", yscale="log", xlabel="MACs of one image, millions", ylabel="median latency, one thread, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize="small", title="hollow: unfolded")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _plot_points(axes: Any, points: Sequence[Latency], color: str, label: str) -> None:
    if not points:
        return
    x, y = [each.side.cost.macs / 1e6 for each in points], [each.median for each in points]
    marker = MARKERS[points[0].side.format]
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5)
    for each, *position in zip(points, x, y, strict=True):
        folded = each.side.form == "folded"
        face = color if folded else "white"
        axes.plot(*position, marker, color=color, markerfacecolor=face, label=label if folded else None)
