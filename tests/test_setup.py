"""scripts/setup.sh with stand-ins for Python and pip: two at once, interrupted, failed."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import ROOT

READ = (
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
    "pipeline/images/_jpeg.c",
    "trainer/students/fused/_depthwise.c",
)
READ += ("trainer/students/fused/_depthwise.h",)
# `python -m venv` makes an environment with the same program; `pip install` waits as long as a file `wait` is there.
PYTHON = """#!/bin/bash
case "$*" in
    "-m venv"*) venv="${@: -1}"; rm -rf $venv; mkdir -p $venv/bin; cp "$0" $venv/bin/python; echo venv >> calls ;;
    "-m pip"*) echo pip >> calls; echo "$*" > arguments; touch "${0%/bin/python}/half"
        while [ -e wait ]; do sleep 0.05; done; [ ! -e fail ] ;;
    *version_info*print* | *print*version_info*) echo 3.12 ;;
esac
"""
INSTALLING = (
    "setup: installing the packages into .venv: two to ten minutes and 6 GB at first, seconds when they are there\n"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a checkout"
    for name in (*READ, "scripts/setup.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    for name, text in {"python": PYTHON, "pkg-config": "#!/bin/sh\n", "c++": "#!/bin/sh\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def start(checkout: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.Popen[str]:
    environment = os.environ | {"PATH": f"{checkout}/bin:{path}", "PYTHON": "python"}
    return subprocess.Popen(
        ["scripts/setup.sh", *arguments],
        cwd=checkout,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls"
    return path.read_text().split() if path.exists() else []


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_says_what_it_does(checkout: Path) -> None:
    assert finish(start(checkout)) == (0, f"setup: making .venv for Python 3.12\n{INSTALLING}", "")
    assert calls(checkout) == ["venv", "pip"]
    assert finish(start(checkout)) == (0, INSTALLING, "")
    assert calls(checkout) == ["venv", "pip", "pip"]


def test_two_at_once_wait_for_each_other(checkout: Path) -> None:
    (checkout / "wait").touch()
    first = start(checkout)
    wait(lambda: calls(checkout) == ["venv", "pip"])
    second = start(checkout)
    assert second.stdout is not None
    assert second.stdout.readline() == "setup: another one is at work in this checkout; waiting for it\n"
    (checkout / "wait").unlink()
    assert finish(first)[0] == 0
    assert finish(second) == (0, "", "")
    assert calls(checkout) == ["venv", "pip"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_starts_clean(checkout: Path, number: int) -> None:
    (checkout / "wait").touch()
    process = start(checkout)
    wait(lambda: (checkout / ".venv/half").exists())
    os.killpg(process.pid, number)
    assert finish(process)[0] != 0
    assert not (checkout / ".venv/.ready").exists()
    (checkout / "wait").unlink()
    status, out, err = finish(start(checkout))
    assert (status, err) == (0, "")
    assert out == (
        "setup: the last one was interrupted; starting again with a new .venv\n"
        f"setup: making .venv for Python 3.12\n{INSTALLING}"
    )
    assert calls(checkout) == ["venv", "pip", "venv", "pip"]


def test_a_failed_one_says_so_and_goes_on_from_there(checkout: Path) -> None:
    (checkout / "fail").touch()
    status, _, err = finish(start(checkout))
    assert (status, err) == (
        2,
        "setup: expected pip to install the packages, found that it could not (its message is above); run again when "
        "that is mended\n",
    )
    assert not (checkout / ".venv/.ready").exists()
    (checkout / "fail").unlink()
    assert finish(start(checkout)) == (0, INSTALLING, "")
    assert calls(checkout) == ["venv", "pip", "pip"]


def test_another_environment_is_made_of_other_versions_and_leaves_the_first_alone(checkout: Path) -> None:
    assert finish(start(checkout))[0] == 0
    (checkout / "wait").touch()
    process = start(checkout, "build/other", "build/lowest.txt")
    wait(lambda: (checkout / "build/other/half").exists())
    assert "--constraint build/lowest.txt" in (checkout / "arguments").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process)[0] != 0
    (checkout / "wait").unlink()
    status, out, err = finish(start(checkout))
    assert (status, err) == (0, "")
    assert out == f"setup: the last one was interrupted; starting again with a new build/other\n{INSTALLING}"
    assert (checkout / ".venv/.ready").exists()
    assert not (checkout / "build/other").exists()


def test_system_packages_that_it_cannot_install_are_named(checkout: Path) -> None:
    (checkout / "bin/pkg-config").write_text('#!/bin/sh\n[ "$2" != libturbojpeg ] && [ "$2" != zlib ]\n')
    for tool in ("bash", "cat", "dirname", "flock", "id"):  # and no apt-get
        (checkout / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    status, _, err = finish(start(checkout, path=""))
    assert status == 2
    assert "expected the system libraries libturbojpeg0-dev zlib1g-dev, found them missing" in err
    assert "\n  sudo apt-get install libturbojpeg0-dev zlib1g-dev\n" in err
    assert not (checkout / ".venv").exists()
