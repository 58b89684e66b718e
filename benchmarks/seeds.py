"""Top-1 of the demo's student over several seeds: on hard labels, on soft labels, and on soft labels with branches.

All have the demo's budget, optimizer, views and data, which `make demo` makes first; the seed decides the initial
weights and the order of the images. A run is a process of its own with one thread, in a temporary folder, `--jobs` of
them at a time. Top-1 is that of the averaged weights at the end, folded where there are branches. `--json PATH` writes
the figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from softshard.trainer.loop.run_folder import METRICS

DATA, CONFIGS = Path("data/demo"), Path("configs/demo")
PLAIN = ("--student.expand", "null")
KINDS = {
    "hard labels": ("student_hard", PLAIN),
    "soft labels": ("student_soft", PLAIN),
    "soft labels, expanded": ("student_soft", ()),
}


class Result(NamedTuple):
    """top1 in percent; CPU seconds of the run."""

    top1: float
    cpu: float


def train(kind: str, seed: int) -> Result:
    recipe, changes = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "softshard.trainer",
            "train",
            "--config",
            str(CONFIGS / f"{recipe}.yaml"),
            *changes,
        ]
        cpu = cpu_seconds([*command, "--seed", str(seed), "--output", str(run)], Path(folder) / "log.txt")
        last = json.loads((run / METRICS).read_text().splitlines()[-1])
    result = Result(last.get("folded_top1", last["ema_top1"]), cpu)
    print(f"{kind}, seed {seed}: top-1 {result.top1:.2f} %", file=sys.stderr, flush=True)
    return result


def cpu_seconds(command: Sequence[str], log: Path) -> float:
    """CPU seconds of a command. Raises RuntimeError, with what it printed, when it fails."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}:\n{log.read_text()}")
    return usage.ru_utime + usage.ru_stime


def table(results: dict[str, list[Result]]) -> str:
    lines = ["| student               | top-1, mean |   lowest to highest | deviation | CPU seconds |"]
    lines += ["| --------------------- | ----------: | ------------------: | --------: | ----------: |"]
    for kind, found in results.items():
        top1, cpu = [result.top1 for result in found], statistics.mean(result.cpu for result in found)
        spread = f"{min(top1):.2f} to {max(top1):.2f} %"
        deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
        lines.append(f"| {kind:21} | {statistics.mean(top1):9.2f} % | {spread:>19} | {deviation:9.2f} | {cpu:11.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = [name for name in ("train.beton", "validation.beton", "labels.zarr") if not (DATA / name).exists()]
    if missing:
        parser.error(f"expected {DATA}/{missing[0]}, which the demo makes, found none; run `make demo` first")
    plan = [(kind, seed) for seed in range(options.seeds) for kind in KINDS]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda run: train(*run), plan))
    results = {kind: [result for (name, _), result in zip(plan, found, strict=True) if name == kind] for kind in KINDS}
    print(table(results))
    if options.json:
        figures = {kind: [result._asdict() for result in rows] for kind, rows in results.items()}
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
