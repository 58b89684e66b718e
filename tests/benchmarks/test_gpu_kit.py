"""The folder for GPU machines: what it installs there, what it refuses, and that an empty cv2 changes no pixel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.small_loaders import RICH, make, pixels

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe

DEMO = load_recipe(LabelRecipe, ROOT / "configs/demo/label.yaml", []).views
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
HERE = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/benchmarks'}"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_kit = load("gpu_kit")

# cv2

RENDER = """
import sys
from pathlib import Path
import cv2, ffcv, softshard
import test_gpu_kit
assert not hasattr(cv2, "imencode")
Path(sys.argv[1]).write_bytes(test_gpu_kit.rendered(*map(Path, sys.argv[2:])))
print(cv2.__file__, ffcv.__file__, softshard.__file__, sep="\\n")
"""


def rendered(*betons: Path) -> bytes:
    """The bytes of views of all images: the demo's, and views with everything in them."""
    found = []
    for path in betons:
        beton = open_beton(path)
        for views in (DEMO, RICH):
            shown = np.tile(np.arange(3), (len(beton), 1))
            found.append(pixels(make(beton, views=views), np.arange(len(beton)), shown))
    return torch.cat([images.flatten() for images in found]).numpy().tobytes()


def rendered_elsewhere(path: str, betons: list[Path], out: Path) -> list[str]:
    """Render in a process with these folders on its path; the files of its cv2, ffcv and pipeline."""
    command = [sys.executable, "-c", RENDER, str(out), *map(str, betons)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_empty_cv2_changes_no_pixel(digits: Beton, photos: Beton, tmp_path: Path) -> None:
    """The one in the kit: FFCV imports cv2, and calls it only to write images."""
    empty = gpu_kit.empty_cv2(tmp_path / "empty")
    betons = [digits.path, photos.path]
    files = rendered_elsewhere(f"{empty}:{HERE}", betons, tmp_path / "pixels")
    assert files[0] == str(empty / "cv2.py")
    assert cv2.imencode  # here is the real one
    assert (tmp_path / "pixels").read_bytes() == rendered(*betons)


# What is made


def fake_python(folder: Path, version: str = "3.12", headers: bool = True) -> Path:
    (folder / "include").mkdir()
    if headers:
        (folder / "include/Python.h").touch()
    return program(folder / "python", f"echo {version} {folder}/include")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", ["none", "broken"])
def test_a_python_that_does_not_run(kind: str, tmp_path: Path, capsys) -> None:
    python = tmp_path / "python3.12"
    if kind == "broken":
        program(python, "exit 127")  # as a shim of pyenv for a version that is not chosen
    assert gpu_kit.main(["--python", str(python), "--out", str(tmp_path / "kit")]) == 2
    assert capsys.readouterr().err == (
        f"gpu-kit: expected a Python of the GPU machine's version, found no {python} that runs; install it with its "
        "headers, or name another with --python\n"
    )
    assert not (tmp_path / "kit").exists()


def test_a_python_without_headers(tmp_path: Path, capsys) -> None:
    python = fake_python(tmp_path, headers=False)
    assert gpu_kit.main(["--python", str(python), "--out", str(tmp_path / "kit")]) == 2
    assert capsys.readouterr().err == (
        f"gpu-kit: expected the headers of {python}, found no Python.h in {tmp_path}/include; install them (on Debian "
        "and Ubuntu python3.12-dev), or name another Python with --python\n"
    )


def test_what_is_not_a_kit_is_not_replaced(tmp_path: Path, capsys) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("all of it")
    assert gpu_kit.main(["--python", str(fake_python(tmp_path)), "--out", str(tmp_path / "work")]) == 2
    assert capsys.readouterr().err == (
        f"gpu-kit: expected an older kit or nothing at {tmp_path}/work, found something else; choose another --out\n"
    )
    assert (tmp_path / "work/thesis.txt").read_text() == "all of it"


def test_a_failing_step_leaves_the_older_kit(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit/modules.txt").write_text("- older.whl\n")
    monkeypatch.setattr(gpu_kit, "pack_images", lambda kit, work: gpu_kit.run(["sh", "-c", "echo no disk; exit 3"]))
    assert gpu_kit.main(["--python", str(fake_python(tmp_path)), "--out", str(tmp_path / "kit")]) == 2
    assert capsys.readouterr().err == (
        "gpu-kit: expected `sh -c echo no disk; exit 3` to succeed, found status 3; see what it said:\nno disk\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["include", "kit", "python"]
    assert (tmp_path / "kit/modules.txt").read_text() == "- older.whl\n"


def test_the_size_is_checked(tmp_path: Path) -> None:
    for name, size in {"small": 1_000, "wheels.whl": 59_999_000}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert gpu_kit.checked_size(tmp_path) == 60_000_000
    (tmp_path / "one").write_bytes(b"1")
    message = (
        "expected at most 60,000,000 bytes, found 60,000,001, of which 59,999,000 are wheels.whl; leave something out"
    )
    with pytest.raises(gpu_kit.KitError, match=f"^{re.escape(message)}$"):
        gpu_kit.checked_size(tmp_path)


def test_every_wheel_has_its_module() -> None:
    wheels = ["ruamel_yaml-0.19.1-py3-none-any.whl", "softshard-0.1.0-cp312-cp312-manylinux_2_27_x86_64.whl"]
    wheels += [
        "ffcv-1.0.2-cp312-cp312-linux_x86_64.whl",
        "empty_cv2-0-py3-none-any.whl",
        "ruamel.yaml-1-py3-none-any.whl",
    ]
    assert gpu_kit.module_lines(wheels) == [
        f"- {wheels[1]}",
        f"cv2 {wheels[3]}",
        f"ffcv {wheels[2]}",
        f"ruamel.yaml {wheels[4]}",
        f"ruamel.yaml {wheels[0]}",
    ]


def test_only_what_cannot_be_imported_is_missing(tmp_path: Path, monkeypatch) -> None:
    """A cv2 without the system's libGL is there, but cannot be imported."""
    (tmp_path / "broken_module.py").write_text("raise ImportError('libGL.so.1')")
    monkeypatch.syspath_prepend(tmp_path)
    modules = ("-", "broken_module", "json", "json.none", "no_such_module", "zarr")
    lines = "".join(f"{module} {module}.whl\n" for module in modules)
    assert gpu_kit.missing_wheels(lines) == [
        f"wheels/{module}.whl" for module in ("-", "broken_module", "json.none", "no_such_module")
    ]


def test_the_versions_are_those_of_the_constraints() -> None:
    pinned = {re.sub("[-_.]+", "-", line.split("==")[0]).lower() for line in gpu_kit.CONSTRAINTS.read_text().split()}
    assert {*gpu_kit.CONTRIBUTED, "ffcv"} <= pinned


# run.sh

CHECK = """
import os, sys
import kit_alone, kit_always, numpy
print(os.getcwd(), sys.argv[1:], kit_alone.__file__, kit_always.VALUE, numpy.__file__)
"""


def write_wheel(path: Path, module: str, text: str) -> None:
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of two small wheels, and of one that is named, but never touched where its module is there."""
    folder = tmp_path / "a kit"
    for name in ("wheels", "scripts", "benchmarks"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/gpu_kit.py", folder / "scripts")
    shutil.copy(ROOT / "scripts/gpu_kit_run.sh", folder / "run.sh")
    (folder / "benchmarks/gpu_check.py").write_text(CHECK)
    (folder / "python-version").write_text(f"{VERSION}\n")
    write_wheel(folder / "wheels/alone-1-py3-none-any.whl", "kit_alone", "")
    write_wheel(folder / "wheels/always-1-py3-none-any.whl", "kit_always", "VALUE = 1")
    lines = ("- always-1-py3-none-any.whl", "kit_alone alone-1-py3-none-any.whl", "numpy numpy-1-py3-none-any.whl")
    (folder / "modules.txt").write_text("\n".join(lines))
    return folder


def run_kit(kit: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "PIP_NO_INDEX": "1"}
    return subprocess.run([kit / "run.sh", *arguments], env=environment, capture_output=True, text=True, cwd="/")


def test_the_kit_installs_what_is_missing_once(kit: Path) -> None:
    first, second = run_kit(kit, "--tiny"), run_kit(kit)
    site = kit / "site"
    installing, line = "run.sh: installing 2 wheels into site/\n", f"{site}/kit_alone.py 1 {np.__file__}"
    assert (first.stderr, second.stderr) == ("", "")
    assert first.stdout == f"{installing}/ ['--device', 'cuda', '--tiny'] {line}\n"
    assert second.stdout == f"/ ['--device', 'cuda'] {line}\n"
    write_wheel(kit / "wheels/always-1-py3-none-any.whl", "kit_always", "VALUE = 2")  # a newer kit was copied over it
    assert (
        run_kit(kit).stdout
        == f"run.sh: installing 2 wheels into site/\n/ ['--device', 'cuda'] {line.replace(' 1 ', ' 2 ')}\n"
    )
    assert sorted(path.name for path in kit.iterdir()) == sorted(
        ["benchmarks", "modules.txt", "python-version", "run.sh", "scripts", "site", "wheels"]
    )


def test_an_installation_that_fails_leaves_no_site(kit: Path) -> None:
    (kit / "wheels/alone-1-py3-none-any.whl").write_bytes(b"half a wheel")
    done = run_kit(kit)
    assert done.returncode != 0
    assert not (kit / "site").exists()


def test_another_python_is_refused(kit: Path, tmp_path: Path) -> None:
    (kit / "python-version").write_text("3.9\n")
    done = run_kit(kit)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"run.sh: expected Python 3.9, found {VERSION} as {sys.executable}; call PYTHON=/path/to/python3.9 ./run.sh, "
        f"or make a kit with --python python{VERSION}\n"
    )
    done = run_kit(kit, python=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"run.sh: expected Python 3.9, found no {tmp_path}/none that runs; call PYTHON=/path/to/python3.9 ./run.sh\n"
    )
    assert not (kit / "site").exists()


@pytest.mark.slow  # it compiles, and downloads 35 MB
def test_the_whole_kit(digits: Beton, photos: Beton, tmp_path: Path) -> None:
    """For the Python of the tests, which has what the kit asks for: its wheels give the same pixels, with no index."""
    kit = tmp_path / "kit"
    subprocess.run([sys.executable, ROOT / "scripts/gpu_kit.py", "--python", sys.executable, "--out", kit], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    assert {path.name for path in (kit / "data/demo").iterdir()} >= {
        "train.beton",
        "validation.beton",
        "photographs.beton",
    }
    wheels = list((kit / "wheels").iterdir())
    assert len(wheels) == len(gpu_kit.BUILT | gpu_kit.CONTRIBUTED)
    assert "usage: gpu_check.py" in run_kit(kit, "--help").stdout
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "all"]
    subprocess.run([*pip, *wheels], check=True)
    betons = [digits.path, photos.path]
    files = rendered_elsewhere(f"{tmp_path / 'all'}:{ROOT / 'tests'}", betons, tmp_path / "pixels")
    assert files == [str(tmp_path / "all" / name) for name in ("cv2.py", "ffcv/__init__.py", "pipeline/__init__.py")]
    assert (tmp_path / "pixels").read_bytes() == rendered(*betons)
