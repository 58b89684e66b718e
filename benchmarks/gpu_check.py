"""Everything a GPU must prove, in one command: is the arithmetic right, what does it cost, does it work together?

Four stages in the order of their worth (benchmarks/gpu_stages/ has a module for each):

    numerics  branches, losses, labels, training and resuming on the device, against float64 on the CPU
    student   a step of MobileNetV2 and GhostNetV3 in every form, against timm's own and a teacher that runs along
    teacher   images a second of the teachers, and what labelling ImageNet would take
    pipeline  label and train on the demo's images: rate, waiting, copies; two processes where there are two GPUs

Every stage runs in a process of its own, and every result is in the report (--out) as soon as there is one: a check
that fails, hangs or breaks the device costs no other. A second run goes on where the first one stopped: what is ok
stays, the rest is tried again. What needs a package that is not installed is skipped, and says so.

On a GPU that is rented, copy the folder that `make gpu-kit` makes and run its run.sh. `--device cpu --tiny` tries the
check itself. gpu_table.py makes tables from a report.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # with what layers are compared there, too
sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages, where they are not installed

from gpu_stages import STAGES
from gpu_stages.machine import describe
from gpu_stages.report import Report
from gpu_stages.stage import Setting, run_stage

from pipeline.errors import DataError, SoftshardError

SHARES = {"numerics": 5, "student": 6, "teacher": 2, "pipeline": 4}  # of the time
SPAWN = multiprocessing.get_context("spawn")


def check(device: str, tiny: bool, stages: Sequence[str], seconds: float, out: Path) -> bool:
    """Run what the report at `out` lacks; whether no stage failed. Raises DataError when there is no such device."""
    machine = _machine(device)
    report = Report.open(out, machine, tiny)
    report.save()
    print(f"gpu-check: {machine['gpu'] or machine['processor']}, torch {machine['torch']}; results go to {out}")
    run, now = datetime.now().isoformat(), time.time()
    ends = _ends(stages, seconds)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, tiny, Path(folder))
        for stage in stages:
            found.append(run_to_the_end(stage, setting, out, machine, run, now + ends[stage]))
    for stage, (status, why) in zip(stages, found, strict=True):
        print(f"gpu-check: {stage}: {status}{f' ({why})' if why else ''}")
    return all(status != "failed" for status, _ in found)


def run_to_the_end(
    stage: str, setting: Setting, out: Path, machine: dict[str, Any], run: str, deadline: float
) -> tuple[str, str]:
    """A stage, in as many processes as it takes; its status, and why it is not ok."""
    while True:
        before = Report.open(out, machine, setting.tiny).begun(stage, run)
        process = SPAWN.Process(target=run_stage, args=(stage, setting, out, machine, run, deadline))
        process.start()
        try:
            process.join(max(0.0, deadline - time.time()))
            late = process.is_alive()
        finally:
            _end(process)
        status = process.exitcode or 0
        report = Report.open(out, machine, setting.tiny)
        _close_running(report, stage, status, late)
        stuck = report.begun(stage, run) == before
        if late or status == 0 or stuck or not report.pending(stage, run):
            why = f"its process ended {_how(status)} before the first check" if stuck and status else ""
            return report.conclude(stage, why), report.content["stages"][stage]["why"]


def _ends(stages: Sequence[str], seconds: float) -> dict[str, float]:
    """When each stage ends at the latest, in seconds from the start; what one leaves of its share, the next have."""
    total = sum(SHARES[stage] for stage in stages)
    sums = [sum(SHARES[stage] for stage in stages[: number + 1]) for number in range(len(stages))]
    return {stage: seconds * part / total for stage, part in zip(stages, sums, strict=True)}


def _end(process: Any) -> None:
    """End what is left of a stage, and all that it started."""
    if process.is_alive():
        process.kill()
    process.join()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has ended with all of them, or never began a group
        return


def _close_running(report: Report, stage: str, status: int, late: bool) -> None:
    """A check that the process left unfinished has failed."""
    for name, check in report.checks(stage).items():
        if check["status"] == "running":
            seconds = round(time.time() - check["started"], 2)
            if late:
                why = "the time of its stage was up"
            elif seconds >= check["limit"]:
                why = f"took more than {check['limit']:g} s (where it was is in the output)"
            else:
                why = f"its process ended {_how(status)}"
            report.record(stage, name, "failed", why=why, run=check["run"], seconds=seconds, figures={})
            print(f"{stage:9} {name:44} failed   {seconds:7.1f} s  {why}", flush=True)
            return


def _how(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _machine(device: str) -> dict[str, Any]:
    """In a process of its own: this one holds no memory of the device."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        try:
            return pool.submit(describe, device).result()
        except RuntimeError as error:
            raise DataError(
                f"gpu-check: expected a GPU for --device {device}, found {error}; run it where there is one, or try "
                "the check itself with --device cpu --tiny"
            ) from None


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if not names or any(name not in STAGES for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(STAGES)}, each once, found {text!r}")
    return [stage for stage in STAGES if stage in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="as small as possible: try the check itself")
    parser.add_argument("--stages", type=_stages, default=list(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=1500.0, help="all stages together, at most")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    options = parser.parse_args()
    try:
        return 0 if check(options.device, options.tiny, options.stages, options.seconds, options.out) else 1
    except SoftshardError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
