"""Everything a GPU must prove, in one command: is the arithmetic right, what does it cost, does it work together?

Four stages in the order of their worth (benchmarks/gpu_stages/ has a module for each):

    numerics  branches, losses, labels, training and resuming on the device, against float64 on the CPU
    student   a step of MobileNetV2 and GhostNetV3 in every form, against timm's own and a teacher that runs along
    teacher   images a second of the teachers, and what labeling ImageNet would take
    pipeline  label and train on the demo's images: rate, waiting, copies; two processes where there are two GPUs

Every stage runs in a process of its own, and every result is in the report (--out) as soon as there is one: a check
that fails, hangs or breaks the device costs no other. A second run goes on where the first one stopped: what is ok
stays, the rest is tried again. What needs a package that is not installed is skipped, and says so.

On a GPU that is rented, copy the folder that `make gpu-kit` makes and run its run.sh. `--device cpu --tiny` tries the
check itself. gpu_table.py makes tables from a report.
"""

import argparse
import fcntl
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # with what layers are compared there, too
sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages, where they are not installed

from gpu_stages import STAGES
from gpu_stages.machine import describe
from gpu_stages.report import Report
from gpu_stages.stage import Setting, run_stage

from softshard.pipeline.runtime.errors import DataError, SoftshardError

SHARES = {"numerics": 6, "student": 6, "teacher": 2, "pipeline": 4}  # of the time
MOST_SECONDS = 1e6
SPAWN = multiprocessing.get_context("spawn")


def check(device: str, tiny: bool, stages: Sequence[str], seconds: float, out: Path) -> bool:
    """Run what the report at `out` lacks; whether no stage failed. Raises DataError when there is no such device, and
    for a report of others, one at work, or one that cannot be written."""
    machine = _machine(device)
    with _alone(out), tempfile.TemporaryDirectory() as folder:
        report = Report.open(out, machine, tiny)
        for stage in report.content["stages"]:
            report.close(stage, "its run was interrupted")
        print(f"gpu-check: {machine['gpu'] or machine['processor']}, torch {machine['torch']}; results go to {out}")
        setting, run, now = Setting(device, tiny, Path(folder)), datetime.now().isoformat(), time.time()
        ends, found = _ends(stages, seconds), []
        for stage in stages:
            found.append(run_to_the_end(stage, setting, out, machine, run, now + ends[stage]))
    for stage, (status, why) in zip(stages, found, strict=True):
        print(f"gpu-check: {stage}: {status}{f' ({why})' if why else ''}")
    return all(status != "failed" for status, _ in found)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While the block runs, no other check writes this report, which can be written."""
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"{out}: expected no other check at work on this report, found one; wait for it, or name another file "
            "with --out"
        ) from None
    except OSError as error:
        raise DataError(
            f"{out}: expected a place where a report can be written, found: {error}; name another file with --out"
        ) from None
    with lock:
        yield


def run_to_the_end(
    stage: str, setting: Setting, out: Path, machine: dict[str, Any], run: str, deadline: float
) -> tuple[str, str]:
    """A stage, in as many processes as it takes; its status, and why it is not ok."""
    while True:
        before = Report.open(out, machine, setting.tiny)
        before.save()
        process = SPAWN.Process(target=run_stage, args=(stage, setting, out, machine, run, deadline))
        process.start()
        try:
            process.join(max(0.0, deadline - time.time()))
            late = process.is_alive()
        finally:
            _end(process)
        status, report = process.exitcode or 0, Report.open(out, machine, setting.tiny)
        report.close(stage, "the time of its stage was up" if late else f"its process ended {_how(status)}", run)
        stuck = report.begun(stage, run) == before.begun(stage, run)
        if late or status == 0 or stuck or not report.pending(stage, run):
            why = f"its process ended {_how(status)} before the first check" if stuck and status and not late else ""
            return report.conclude(stage, why), report.content["stages"][stage]["why"]


def _ends(stages: Sequence[str], seconds: float) -> dict[str, float]:
    """When each stage ends at the latest, in seconds from the start; what one leaves of its share, the next have."""
    total = sum(SHARES[stage] for stage in stages)
    sums = [sum(SHARES[stage] for stage in stages[: number + 1]) for number in range(len(stages))]
    return {stage: seconds * part / total for stage, part in zip(stages, sums, strict=True)}


def _end(process: Any) -> None:
    """End what is left of a stage, and all that it started, also in sessions of their own."""
    others = []
    if process.is_alive():
        with suppress(ImportError):
            import psutil

            with suppress(psutil.Error):
                others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    process.join()
    with suppress(ProcessLookupError, PermissionError):  # it has ended with all of them, or never began a group
        os.killpg(process.pid, signal.SIGKILL)
    for other in others:
        with suppress(Exception):  # it has ended by itself
            other.kill()


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
    if any(name not in STAGES for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(STAGES)}, each once, found {text!r}")
    return [stage for stage in STAGES if stage in names]


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_SECONDS:g}, found {text}")
    return value


def _stop(number: int, _: Any) -> None:
    """As Ctrl-C does, end what was started."""
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="as small as possible: try the check itself")
    parser.add_argument("--stages", type=_stages, default=list(STAGES), help=f"some of {','.join(STAGES)}")
    parser.add_argument("--seconds", type=_seconds, default=1500.0, help="all stages together, at most")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # of `timeout`, a batch system, or a connection that is lost
        signal.signal(number, _stop)
    try:
        return 0 if check(options.device, options.tiny, options.stages, options.seconds, options.out) else 1
    except SoftshardError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
