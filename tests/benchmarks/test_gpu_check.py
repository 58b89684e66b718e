"""benchmarks/gpu_check.py: what becomes of checks that fail, hang or take their process with them, and of those that
lack what they need."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_table
import numpy as np
import psutil
import pytest
from gpu_stages.report import Report
from gpu_stages.stage import COMPILER, first_missing
from helpers.paths import ROOT

from softshard.pipeline.runtime.errors import DataError

DRIVER = ("gpu_check.py", "gpu_stages/__init__.py", "gpu_stages/report.py", "gpu_stages/machine.py")
DRIVER += ("gpu_stages/stage.py",)
# all that Python 3.11-3.13, torch, timm, numpy and what these need do not bring
ABSENT = (
    "accelerate", "braceexpand", "cv2", "ffcv", "matplotlib", "mlxtend", "numba", "numcodecs", "obstore", "onnx",
    "pandas", "psutil", "pyarrow", "pydantic", "ruamel", "scipy", "sklearn", "tensorboard", "triton", "webdataset",
    "zarr",
)  # fmt: skip
FAKE = """
import os, time
from gpu_stages.stage import Check, Outcome, Skipped

def log(setting, name):
    with open({log!r}, "a") as file:
        file.write(name + "\\n")

def fine(setting):
    log(setting, "fine")
    return Outcome({{"ms": 1.5}})

def wrong(setting):
    log(setting, "wrong")
    return Outcome({{"error": 2.0}}, ["error 2.0 (at most 1.0)"])

def raises(setting):
    raise ValueError("two\\nlines")

def hangs(setting):
    time.sleep(600)

def dies(setting):
    os._exit(7)

def crashes(setting):
    os.kill(os.getpid(), 11)

def alone(setting):
    raise Skipped("one GPU only")

def checks(setting):
    return [
        Check("fine", fine), Check("wrong", wrong), Check("raises", raises), Check("hangs", hangs, seconds=1.0),
        Check("dies", dies), Check("crashes", crashes), Check("lacks", fine, ("softshard_lacks_this",)),
        Check("alone", alone), Check("last", fine),
    ]
"""


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The check on the CPU, with one thread; its report is in gpu-report.json of the folder."""
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny", *options]
    known = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu-report.json").read_text())


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """The driver alone, with a stage `numerics` of all that a check can do."""
    for name in DRIVER:
        (tmp_path / "benchmarks" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    write_fake(tmp_path, FAKE)
    return tmp_path


def write_fake(folder: Path, text: str) -> None:
    (folder / "benchmarks/gpu_stages/numerics.py").write_text(text.format(log=str(folder / "log.txt")))


def test_what_fails_costs_nothing_else(fake: Path) -> None:
    done = run(fake, "--stages", "numerics")
    assert done.returncode == 1, done.stderr
    stage = report_of(fake)["stages"]["numerics"]
    assert {name: (check["status"], check["why"]) for name, check in stage["checks"].items()} == {
        "fine": ("ok", ""),
        "wrong": ("failed", "error 2.0 (at most 1.0)"),
        "raises": ("failed", "ValueError: two lines"),
        "hangs": ("failed", "took more than 1 s (where it was is in the output)"),
        "dies": ("failed", "its process ended with status 7"),
        "crashes": ("failed", "its process ended by SIGSEGV"),
        "lacks": ("skipped", "needs softshard_lacks_this: No module named 'softshard_lacks_this'"),
        "alone": ("skipped", "one GPU only"),
        "last": ("ok", ""),
    }
    assert (stage["status"], stage["why"]) == ("failed", "failed: wrong, raises, hangs, dies, crashes")
    assert stage["checks"]["fine"]["figures"] == {"ms": 1.5}
    assert stage["checks"]["wrong"]["figures"] == {"error": 2.0}
    assert "in hangs" in done.stderr
    assert done.stdout.splitlines()[-1] == "gpu-check: numerics: failed (failed: wrong, raises, hangs, dies, crashes)"


def test_a_second_run_goes_on(fake: Path) -> None:
    run(fake, "--stages", "numerics")
    assert (fake / "log.txt").read_text().split() == ["fine", "wrong", "fine"]
    (fake / "log.txt").unlink()
    mended = FAKE.replace('["error 2.0 (at most 1.0)"]', "[]").split("def checks")[0]
    write_fake(fake, mended + 'def checks(setting):\n    return [Check("fine", fine), Check("wrong", wrong)]\n')
    done = run(fake, "--stages", "numerics")
    assert done.returncode == 0, done.stderr
    assert (fake / "log.txt").read_text().split() == ["wrong"]
    stage = report_of(fake)["stages"]["numerics"]
    assert (stage["status"], stage["why"]) == ("ok", "")
    assert stage["checks"]["fine"]["code"] != stage["checks"]["wrong"]["code"]


def test_time_is_bounded_and_what_it_left_out_is_named(fake: Path) -> None:
    write_fake(
        fake,
        FAKE.split("def checks")[0]
        + 'def checks(setting):\n    return [Check("fine", fine), Check("hangs", hangs), Check("last", fine)]\n',
    )
    done = run(fake, "--stages", "numerics", "--seconds", "3")
    assert done.returncode == 1
    stage = report_of(fake)["stages"]["numerics"]
    assert stage["checks"]["hangs"]["why"] == "the time of its stage was up"
    assert stage["why"] == "failed: hangs; not reached: last; run again to go on"


def test_a_stage_that_cannot_begin_has_failed(fake: Path) -> None:
    write_fake(fake, "import softshard_lacks_this")
    done = run(fake, "--stages", "numerics,student")
    assert done.returncode == 1
    why = "its process ended with status 1 before the first check"
    for stage in ("numerics", "student"):
        found = report_of(fake)["stages"][stage]
        assert (found["status"], found["why"]) == ("failed", why)


def test_an_interrupted_check_has_failed(fake: Path) -> None:
    """Stopped as by `timeout` or a lost connection: nothing is left at work, and the next run knows what was."""
    write_fake(fake, FAKE.split("def checks")[0].replace("time.sleep(600)", CHILD) + HANGING)
    process = start(fake)
    wait(lambda: (fake / "child.txt").exists())
    with pytest.raises(BlockingIOError), (fake / ".gpu-report.json.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = run(fake, "--stages", "numerics")
    assert (second.returncode, second.stderr) == (
        2,
        "gpu-report.json: expected no other check at work on this report, found one; wait for it, or name another file "
        "with --out\n",
    )
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    for pid in (fake / "child.txt").read_text().split():
        wait(lambda pid=pid: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie")
    assert gpu_table.main([str(fake / "gpu-report.json")]) == 2  # tiny; but it is a report
    assert report_of(fake)["stages"]["numerics"]["checks"]["hangs"]["status"] == "running"
    write_fake(fake, FAKE.split("def checks")[0] + HANGING.replace("hangs)", "dies)"))
    assert run(fake, "--stages", "student").returncode == 1
    hangs = report_of(fake)["stages"]["numerics"]["checks"]["hangs"]
    assert (hangs["status"], hangs["why"]) == ("failed", "its run was interrupted")


CHILD = """
    import subprocess, sys
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with open({log!r}.replace("log", "child"), "w") as file:
        file.write(f"{{os.getpid()}} {{other.pid}}")
    time.sleep(600)
"""
HANGING = 'def checks(setting):\n    return [Check("hangs", hangs)]\n'


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny", "--stages", "numerics"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(ROOT, "--stages", "teacher", "--out", str(tmp_path / "file/report.json"))
    assert done.returncode == 2
    path = tmp_path / "file/report.json"
    start = f"{path}: expected a place where a report can be written, found: "
    assert done.stderr.startswith(start), done.stderr
    assert done.stderr.endswith("; name another file with --out\n")


def test_a_full_disk_costs_only_what_is_not_written(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    report = Report.open(tmp_path / "report.json", {}, tiny=True)
    with monkeypatch.context() as patch:
        patch.setattr("gpu_stages.report.write_atomically", full)
        report.plan("teacher", ["a", "b"])
        report.record("teacher", "a", "ok", why="", run="1", seconds=1.0, figures={"ms": np.float32(0.5)})
        said = capsys.readouterr().out.splitlines()
        assert (
            said[1] == f"gpu-check: {tmp_path}/report.json: not written ([Errno 28] No space left on device); make room"
        )
    report.record("teacher", "b", "ok", why="", run="1", seconds=1.0, figures={"count": np.int64(3)})
    checks = Report.open(tmp_path / "report.json", {}, tiny=True).checks("teacher")
    assert [checks[name]["figures"] for name in "ab"] == [{"ms": 0.5}, {"count": 3.0}]


def test_reports_of_others_are_refused(tmp_path: Path) -> None:
    path, machine = tmp_path / "report.json", {"torch": "2.9", "gpu": "A", "ffcv": None, "driver": "580"}
    Report.open(path, machine, tiny=True).save()
    Report.open(path, machine | {"ffcv": "1.0.2", "driver": None}, tiny=True)  # installed since; not said this time
    with pytest.raises(DataError) as found:
        Report.open(path, machine | {"torch": "2.10", "gpu": "B"}, tiny=False)
    assert str(found.value) == (
        f"{path}: expected a report of this machine and these options, found another: tiny: True; torch: '2.9' instead "
        "of '2.10'; gpu: 'A' instead of 'B'; name another file with --out"
    )


CHECKED = {"status": "ok", "why": "", "date": "", "code": "", "run": "", "figures": {}}
HOSTILE = {
    "half": "{", "a list": "[]", "empty": "{}", "version": '{"version": 2}', "bytes": "\udc80", "deep": "[" * 100_000,
    **{
        name: json.dumps({"version": 1, "machine": {}, "tiny": True, "stages": {}} | changes)
        for name, changes in {
            "machine": {"machine": []}, "tiny": {"tiny": 1}, "stages": {"stages": []},
            "stage": {"stages": {"other": {"planned": [], "checks": {}}}},
            "planned": {"stages": {"teacher": {"planned": [1], "checks": {}}}},
            "checks": {"stages": {"teacher": {"planned": [], "checks": ["a"]}}},
            "check": {"stages": {"teacher": {"planned": [], "checks": {"a": "ok"}}}},
            "why": {"stages": {"teacher": {"planned": [], "checks": {"a": CHECKED | {"why": None}}}}},
            "running": {"stages": {"teacher": {"planned": [], "checks": {"a": CHECKED | {"status": "running"}}}}},
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_report(content: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as found:
        Report.open(path, {}, tiny=True)
    assert str(found.value) == (
        f"{path}: expected a report of benchmarks/gpu_check.py, found none or something else; name another file"
    )


def test_what_is_needed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "softshard_old_numpy.py").write_text("raise ValueError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert first_missing(("json", "softshard_old_numpy")) == "needs softshard_old_numpy: numpy.dtype size changed"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert first_missing((COMPILER,)) == f"needs a C compiler and Python's headers: no Python.h in {tmp_path}"
    (tmp_path / "Python.h").touch()
    assert first_missing((COMPILER,)) == ""
    monkeypatch.setenv("PATH", "")
    assert first_missing((COMPILER,)) == "needs a C compiler"


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf", "1e400"])
def test_times_that_are_none(fake: Path, seconds: str) -> None:
    done = run(fake, "--seconds", seconds)
    assert done.returncode == 2
    assert f"expected 1 to 1e+06, found {seconds}" in done.stderr


@pytest.mark.parametrize("stages", ["", "numeric", "numerics,numerics"])
def test_unknown_stages_are_refused(fake: Path, stages: str) -> None:
    done = run(fake, "--stages", stages)
    assert done.returncode == 2
    assert f"expected some of numerics,student,teacher,pipeline, each once, found {stages!r}" in done.stderr


def test_without_a_gpu_it_says_so(fake: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py"]
    done = subprocess.run(
        command, cwd=fake, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "gpu-check: expected a GPU for --device cuda, found no CUDA device that torch can use; run it where there is "
        "one, or try the check itself with --device cpu --tiny\n",
    )
    assert not (fake / "gpu-report.json").exists()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without what the compiler made, and a folder `absent` of packages that do not import."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("benchmarks", "softshard", "pipeline", "teachers", "trainer", "configs", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__", "golden")
        )
    (folder / "absent").mkdir()
    for name in ABSENT:
        error = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})'
        (folder / "absent" / f"{name}.py").write_text(error)
    return folder


def test_a_bare_machine_imports_students_losses_and_teachers(bare: Path) -> None:
    code = """
import sys, torch, timm
import softshard.teachers, softshard.trainer.losses, softshard.pipeline.store.topk, softshard.pipeline.views.batch
from softshard.trainer.students import build_student, expand, fold
student = expand(build_student("test_efficientnet", 10), torch.zeros(1, 3, 32, 32))
student(torch.randn(2, 3, 32, 32)).sum().backward()
fold(student)
timm.create_model("test_efficientnet", num_classes=10).load_state_dict(fold(student).state_dict(), strict=True)
print(softshard.trainer.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bare, env=bare_environment(bare), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(bare / "softshard/trainer/__init__.py")), done.stderr


@pytest.mark.slow
def test_a_bare_machine_skips_what_it_lacks(bare: Path, tmp_path: Path) -> None:
    """Without any package but torch, timm, numpy and theirs, without compiled extensions and without a compiler."""
    out = tmp_path / "report.json"
    done = run(bare, "--out", str(out), **bare_environment(bare))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads(out.read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "numerics": "ok",
        "student": "ok",
        "teacher": "ok",
        "pipeline": "skipped",
    }
    checks = {name: check for stage in stages.values() for name, check in stage["checks"].items()}
    skipped = {name: check["why"] for name, check in checks.items() if check["status"] == "skipped"}
    for name, why in skipped.items():
        missing = why.removeprefix("needs ").split(":")[0]
        assert missing in (*ABSENT, "softshard.pipeline.views.loader"), name
        assert why == f"needs {missing}: No module named {why.split(chr(39))[1]!r}"
    assert "losses" not in skipped
    assert "layers: pointwise" not in skipped
    assert {"resume: float32, auto", "layers: depthwise, kernels", "label"} <= skipped.keys()


def bare_environment(folder: Path) -> dict[str, str]:
    return {"PATH": "", "CC": "", "PYTHONPATH": str(folder / "absent"), "HOME": str(folder)}
