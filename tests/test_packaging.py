"""What an installation brings: one name, its types, its license, whatever else lies beside it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.paths import ROOT
from PIL import Image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("pipeline", "teachers", "trainer")
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
MODULES = [path.relative_to(ROOT) for name in FOLDERS for path in ROOT.glob(f"{name}/**/*.py")]
PACKAGES = {"softshard"} | {".".join(("softshard", *path.parent.parts)) for path in MODULES}
PACK = "source: {kind: imagefolder, path: images}\noutput: packed.beton\n"
BIN = Path(sys.executable).parent
LIST_OUTPUTS = """
from setuptools.dist import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
print("\\n".join(command.get_outputs()))
"""
FOREIGN = "raise ImportError('this trainer is of another project')\n"


def run(*command: object, cwd: Path) -> str:
    """What a command prints, in an environment that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, as a fresh clone has it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("softshard", *FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """Where a user works, with images and with things of their own that are called like our folders."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").write_text(FOREIGN)
    (tmp_path / "pipeline.py").write_text(FOREIGN)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "1.jpg")
    (tmp_path / "pack.yaml").write_text(PACK)
    return tmp_path


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with this project and with another project's `trainer`. The packages that this
    project needs are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python, version = folder / "bin/python", f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "zz_needed.pth").write_text(sysconfig.get_paths()["purelib"])
    (site / "trainer").mkdir()
    (site / "trainer/__init__.py").write_text(FOREIGN)
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    )
    what = ("--editable", sources) if request.param == "editable" else (wheel(sources, folder),)
    run(*pip, *what, cwd=folder)
    found = run(python, "-c", "import softshard; print(softshard.__file__)", cwd=folder).strip()
    assert Path(found).is_relative_to(sources if request.param == "editable" else site)
    return python


def wheel(sources: Path, folder: Path) -> Path:
    """Built from the source distribution, which has files where the checkout has links."""
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, folder, cwd=sources)
    (archive,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, archive, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_every_package_is_installed_and_typed(sources: Path) -> None:
    outputs = {Path(line) for line in run(sys.executable, "-c", LIST_OUTPUTS, cwd=sources).split() if "build/" in line}
    files = {Path(*path.parts[path.parts.index("lib") + 1 :]) for path in outputs}
    assert {str(path.parent).replace("/", ".") for path in files if path.suffix == ".py"} == PACKAGES
    assert {str(path.parent) for path in files if path.name == "py.typed"} == {
        "softshard", *(f"softshard/{name}" for name in FOLDERS)
    }  # fmt: skip
    assert Path("softshard/pipeline/images/_jpeg.pyi") in files


@pytest.mark.slow
def test_a_wheel_holds_one_name_alone(sources: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel(sources, tmp_path)).namelist()
    assert {name.split("/")[0] for name in names} == {"softshard", "softshard-0.1.0.dist-info"}
    assert {str(Path(name).parent).replace("/", ".") for name in names if name.endswith(".py")} == PACKAGES
    assert len([name for name in names if name.endswith(".so")]) == 2


@pytest.mark.slow
def test_an_installation_works_beside_others_of_the_same_names(installed: Path, user_folder: Path) -> None:
    help = run(installed.parent / "softshard", "--help", cwd=user_folder)
    assert "pack" in help
    assert "train" in help
    run(installed, "-m", "softshard", "pack", "--config", "pack.yaml", cwd=user_folder)
    assert (user_folder / "packed.beton").exists()
    launch = (installed, "-m", "accelerate.commands.launch", "--cpu", "-m", "softshard.trainer")
    assert "--config" in run(*launch, "train", "--help", cwd=user_folder)


@pytest.mark.slow
def test_type_checkers_see_an_installation(installed: Path, user_folder: Path) -> None:
    code = "import softshard.trainer.students.expand as module\nfrom softshard.trainer.students import expand\n"
    (user_folder / "code.py").write_text(f"{code}reveal_type(expand)\nreveal_type(module)\n")
    output = run(sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", installed, "code.py", cwd=user_folder)
    found = json.loads(output[output.index("{") :])["generalDiagnostics"]
    assert [line["severity"] for line in found] == ["information", "information"]
    assert "-> Module" in found[0]["message"]


@pytest.mark.parametrize("command", [(BIN / "softshard",), (sys.executable, "-m", "softshard")], ids=["script", "-m"])
def test_the_command_works_where_a_user_has_folders_of_our_names(
    user_folder: Path, command: tuple[object, ...]
) -> None:
    run(*command, "pack", "--config", "pack.yaml", cwd=user_folder)
    assert (user_folder / "packed.beton").exists()


@pytest.mark.parametrize("name", ["pipeline", "trainer"])
def test_a_checkout_has_its_commands_by_the_folders_names(name: str) -> None:
    assert f"usage: python -m {name} " in run(sys.executable, "-m", name, "--help", cwd=ROOT)


@pytest.mark.slow
def test_a_checkout_is_launched_by_the_folders_name() -> None:
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "trainer")
    assert "--config" in run(*launch, "train", "--help", cwd=ROOT)


def test_no_module_exists_twice(user_folder: Path) -> None:
    run(sys.executable, "-m", "softshard", "pack", "--config", "pack.yaml", cwd=user_folder)
    show = ("-X", "importtime", "-m", "pipeline", "show", user_folder / "packed.beton")
    imported = {line.split()[-1] for line in run(sys.executable, *show, cwd=ROOT).splitlines()}
    assert "softshard.pipeline.show" in imported
    assert {name for name in imported if name.split(".")[0] in FOLDERS} == {"pipeline"}


def test_the_license_and_what_is_owed_are_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert f"version: {PROJECT['project']['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_notice_names_files_that_exist() -> None:
    text = (ROOT / "NOTICE").read_text()
    named = {word.strip("(),.;:\n") for word in text.split() if ".py" in word}
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).is_file()]
