"""The checks of one stage, one after the other, in a process of their own.

A check that raises has failed, and the next one runs. On a GPU a failure ends the process, since it may have broken the
device for it, as everywhere does a check that never returns; gpu_check.py starts another process for what is left.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_stages.report import Report

COMPILER = "a C compiler"  # what Triton and torch.compile build their launchers with
# Read when Triton is imported, and when cuBLAS is first used: the interpreter, and sums in one order every time.
CPU_ENVIRONMENT, GPU_ENVIRONMENT = {"TRITON_INTERPRET": "1"}, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
BROKEN_DEVICE = 3  # the exit status of a process in which further calls of the device may fail
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for when the parent ends
MOST_PROBLEMS = 20  # that are listed


class Skipped(Exception):
    """Raised by a check that cannot run on this machine, with the reason."""


@dataclass(frozen=True)
class Setting:
    """What all checks are told. `folder` is for files; what one check leaves there, others of the run may use."""

    device: str  # cuda or cpu
    tiny: bool  # as small as possible: shows that the check itself works, not what it finds
    folder: Path


@dataclass
class Outcome:
    """What a check found: figures as JSON takes them, and problems; it failed when there are any."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


@dataclass(frozen=True)
class Check:
    """`needs`: modules, or COMPILER, without which it is skipped; `seconds`: when it is given up."""

    name: str
    run: Callable[[Setting], Outcome]
    needs: tuple[str, ...] = ()
    seconds: float = 180.0


def run_stage(stage: str, setting: Setting, path: Path, machine: dict[str, Any], run: str, deadline: float) -> None:
    """Run the checks of a stage that this run has not begun and that no earlier run found ok. `deadline`: when none is
    begun any more, in seconds of time.time()."""
    os.setsid()  # so that a stage can be ended with all that it started
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and ends where gpu_check.py is killed
    os.environ |= CPU_ENVIRONMENT if setting.device == "cpu" else GPU_ENVIRONMENT
    report = Report.open(path, machine, setting.tiny)
    checks = {check.name: check for check in importlib.import_module(f"gpu_stages.{stage}").checks(setting)}
    report.plan(stage, list(checks))
    for name in report.pending(stage, run):
        if time.time() > deadline:
            return
        _run(report, stage, checks[name], setting, run)


def _run(report: Report, stage: str, check: Check, setting: Setting, run: str) -> None:
    started, limit = time.time(), float(check.seconds)
    report.record(stage, check.name, "running", why="", run=run, started=started, limit=limit, figures={})
    faulthandler.dump_traceback_later(limit, exit=True)
    outcome, missing = Outcome(), ""
    try:
        missing = first_missing(check.needs)
        if not missing:
            outcome = check.run(setting)
            _synchronize(setting)  # errors of the device come late
    except Skipped as error:
        missing = str(error)
    except Exception as error:
        traceback.print_exc()
        outcome.problems.append(one_line(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    status = "skipped" if missing else "failed" if outcome.problems else "ok"
    why, seconds = missing or few(outcome.problems), round(time.time() - started, 2)
    report.record(stage, check.name, status, why=why, run=run, seconds=seconds, figures=outcome.figures)
    if setting.device == "cuda" and status == "failed":
        os._exit(BROKEN_DEVICE)  # whatever a failure leaves in torch or on the device, the next check does not meet it
    _clean_up(setting)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def few(problems: list[str]) -> str:
    more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    return "; ".join(problems[:MOST_PROBLEMS]) + more


def first_missing(needs: Iterable[str]) -> str:
    """'needs ffcv: No module named ...' for the first of them that is not here; nothing when all are."""
    for name in needs:
        if name == COMPILER:
            if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
                return f"needs {COMPILER}"
            if not Path(sysconfig.get_path("include"), "Python.h").exists():
                return f"needs {COMPILER} and Python's headers: no Python.h in {sysconfig.get_path('include')}"
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a shared library that is not there, or one made for another numpy
            return f"needs {name}: {error}"
    return ""


def _synchronize(setting: Setting) -> None:
    if setting.device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()


def _clean_up(setting: Setting) -> None:
    """Give back memory."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch._dynamo.reset()
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
