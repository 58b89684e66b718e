"""One folder with all that the check on a GPU machine needs: `make gpu-kit`, copy build/gpu-kit there, call ./run.sh.

That machine has Linux on x86-64, one version of Python with pip, torch, torchvision, timm, accelerate and numba with
what these depend on, and no network. The folder brings this project and FFCV as wheels that hold their shared
libraries, the wheels of everything else that labeling, training and exporting import, and packed images: the demo's
digits, and some photographs. run.sh installs beside itself, and only what is not there already.
"""

import argparse
import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LARGEST_BYTES = 60_000_000
ERROR_STATUS = 2
CARRIED = ("benchmarks", "configs", "scripts", "tests/helpers/*.py")  # from the last, benchmarks take inputs
ALWAYS = "-"  # in place of a module: this project is installed whether or not another build of it is there

# distribution: module. Of matplotlib's own dependencies those that drawing a PNG imports.
CONTRIBUTED = {
    "annotated-types": "annotated_types", "braceexpand": "braceexpand", "contourpy": "contourpy", "cycler": "cycler",
    "donfig": "donfig", "fonttools": "fontTools", "google-crc32c": "google_crc32c", "kiwisolver": "kiwisolver",
    "matplotlib": "matplotlib", "numcodecs": "numcodecs", "obstore": "obstore", "pydantic": "pydantic",
    "pydantic-core": "pydantic_core", "pyparsing": "pyparsing", "python-dateutil": "dateutil",
    "ruamel-yaml": "ruamel.yaml", "safetensors": "safetensors", "six": "six", "typing-inspection": "typing_inspection",
    "zarr": "zarr",
}  # fmt: skip
PHOTOGRAPHS = 96
BUILT = {"softshard": ALWAYS, "ffcv": "ffcv", "empty-cv2": "cv2"}
PURE = ("fonttools",)  # its compiled twin is 4 MB larger, for speed that nothing here needs
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")

# OpenCV is linked to libGLX for its windows. That would bring libX11, which a machine without a screen lacks and
# auditwheel never packs; FFCV calls only OpenCV's resize. So these stand in: no display, no context, no functions.
NO_DISPLAY = """
void *glXGetCurrentContext(void) { return 0; }
void *glXGetCurrentDisplay(void) { return 0; }
void *glXGetProcAddressARB(const unsigned char *name) { (void)name; return 0; }
"""
# What Python and torch cannot do without, and so need not be packed.
ON_EVERY_MACHINE = {
    "ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "librt.so.1",
    "libstdc++.so.6", "libz.so.1",
}  # fmt: skip

README = """softshard's check on a GPU machine. Copy this folder there and call

    ./run.sh            # or PYTHON=/path/to/python{version} ./run.sh

It needs Linux on x86-64 with a glibc of at least that in the wheels' names, Python {version} with pip, torch,
torchvision, timm, accelerate and numba, and no network. Everything is installed into site/ in this folder, and only
what that Python lacks. Arguments are those of benchmarks/gpu_check.py; `./run.sh --help` lists them.
"""


class KitError(Exception):
    """What was expected, what was found, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--python", default="python3.12", help="a Python of the version that the GPU machine has")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-kit")
    parser.add_argument("--missing", type=Path, metavar="KIT", help="print the kit's wheels that this Python lacks")
    options = parser.parse_args(arguments)
    try:
        if options.missing:
            print("\n".join(missing_wheels((options.missing / "modules.txt").read_text())))
        else:
            build(options.python, options.out)
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return ERROR_STATUS
    return 0


def build(python: str, out: Path) -> None:
    """Make the kit beside its final name, and give it that name when it is whole."""
    version = target_version(python)
    if out.exists() and not (out / "modules.txt").exists():
        raise KitError(f"expected an older kit or nothing at {out}, found something else; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        kit, work = Path(folder, "kit"), Path(folder, "work")
        for path in (kit / "wheels", work):
            path.mkdir(parents=True)
        copy_files(CARRIED, kit)
        pack_images(kit, work)
        make_wheels(python, version, kit / "wheels", work)
        write_texts(kit, version)
        size = checked_size(kit)
        if out.exists():
            out.rename(Path(folder, "older"))
        kit.rename(out)
    for wheel in sorted((out / "wheels").iterdir(), key=lambda path: -path.stat().st_size):
        print(f"{wheel.stat().st_size:>12,}  {wheel.name}")
    print(f"{size:>12,}  bytes in {out}, for Python {version}")


def target_version(python: str) -> str:
    """`3.12`, of a Python that can build extensions."""
    code = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('include'))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        found = None
    if found is None or found.returncode:
        raise KitError(
            f"expected a Python of the GPU machine's version, found no {python} that runs; install it with its "
            "headers, or name another with --python"
        )
    version, include = found.stdout.strip().split(maxsplit=1)
    if not Path(include, "Python.h").is_file():
        raise KitError(
            f"expected the headers of {python}, found no Python.h in {include}; install them (on Debian and Ubuntu "
            f"python{version}-dev), or name another Python with --python"
        )
    return version


def copy_files(names: Sequence[str], target: Path) -> None:
    """Files of the checkout as they are now, the new ones too, but nothing that git ignores."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *names]
    for name in run(listing, cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def pack_images(kit: Path, work: Path) -> None:
    """The first two stages of the demo, and photographs for the loader, by the Python that `make setup` made: packing
    needs what the kit leaves out."""
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        raise KitError(f"expected the project's own Python to pack the images, found no {python}; run `make setup`")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT / 'benchmarks'}"}
    photographs = f"loader.write_photographs(Path('photographs'), {PHOTOGRAPHS})"
    program = f"from pathlib import Path; import demo, loader; demo.write_digits(); {photographs}"
    run([python, "-c", program], cwd=work, env=environment)
    pack = [python, "-m", "softshard.pipeline", "pack", "--config"]
    for split in ("train", "validation"):
        run([*pack, ROOT / f"configs/demo/pack_{split}.yaml"], cwd=work)
    others = ["--source.path", "photographs", "--output", "data/demo/photographs.beton"]
    run([*pack, ROOT / "configs/demo/pack_train.yaml", *others], cwd=work)
    (kit / "data/demo").mkdir(parents=True)
    for path in (work / "data/demo").iterdir():
        if path.is_file():
            shutil.copy(path, kit / "data/demo")


def make_wheels(python: str, version: str, wheels: Path, work: Path) -> None:
    tools = work / "tools/bin"
    run([python, "-m", "venv", work / "tools"])
    pip = [tools / "python", "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "auditwheel", "patchelf"])
    # Without --as-needed FFCV would be linked to all of OpenCV; -s leaves the names for debuggers out.
    flags = os.environ | {"LDFLAGS": "-Wl,--as-needed -Wl,-s", "CFLAGS": "-g0"}
    copy_files(["."], work / "source")
    ffcv = ["--no-binary", "ffcv", "--constraint", CONSTRAINTS, "ffcv"]
    for name, what in {"softshard": [work / "source"], "ffcv": ffcv}.items():
        run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", work / name, *what], env=flags)
        repair(next((work / name).glob("*.whl")), wheels, work, tools)
    run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, empty_cv2(work / "empty")])
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--constraint", CONSTRAINTS]
    download += ["--python-version", version, "--dest", wheels]
    compiled = [name for name in CONTRIBUTED if name not in PURE]
    run([*download, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS), *compiled])
    run([*download, "--implementation", "py", "--platform=any", *PURE])


def empty_cv2(folder: Path) -> Path:
    """The source of an empty module `cv2`: ffcv imports it, and calls it only where ffcv itself writes images."""
    folder.mkdir()
    (folder / "cv2.py").touch()
    project = '[project]\nname = "empty-cv2"\nversion = "0"\n[tool.setuptools]\npy-modules = ["cv2"]\n'
    (folder / "pyproject.toml").write_text(project)
    return folder


def repair(wheel: Path, wheels: Path, work: Path, tools: Path) -> None:
    """Put a wheel with its shared libraries into `wheels`."""
    stub = work / "no_display"
    if not stub.exists():
        stub.mkdir()
        (stub / "glx.c").write_text(NO_DISPLAY)
        name = "libGLX.so.0"
        run(["cc", "-shared", "-fPIC", "-s", f"-Wl,-soname,{name}", "-o", stub / name, stub / "glx.c"])
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(stub)}
    run([tools / "auditwheel", "repair", "--wheel-dir", wheels, wheel], env=os.environ | environment)
    name = wheel.name.split("-")[0]
    outside = needed_from_outside(next(wheels.glob(f"{name}-*.whl")), work / f"{name}-unpacked", tools / "patchelf")
    if outside:
        raise KitError(
            f"expected {name} to hold every library that a bare machine lacks, found that it needs "
            f"{', '.join(sorted(outside))}; build on a system whose OpenCV is linked to fewer"
        )


def needed_from_outside(wheel: Path, folder: Path, patchelf: Path) -> set[str]:
    """The shared libraries that a wheel names, but neither it nor every machine has."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries = [path for path in folder.rglob("*") if ".so" in path.suffixes]
    needed = {name for path in libraries for name in run([patchelf, "--print-needed", path]).split()}
    return needed - {path.name for path in libraries} - ON_EVERY_MACHINE


def write_texts(kit: Path, version: str) -> None:
    modules = module_lines([wheel.name for wheel in (kit / "wheels").iterdir()])
    (kit / "modules.txt").write_text("".join(f"{line}\n" for line in modules))
    (kit / "python-version").write_text(f"{version}\n")
    (kit / "README.txt").write_text(README.format(version=version))
    shutil.copy(ROOT / "scripts/gpu_kit_run.sh", kit / "run.sh")
    (kit / "run.sh").chmod(0o755)


def module_lines(wheels: Sequence[str]) -> list[str]:
    """`MODULE WHEEL` for every wheel, by name."""
    modules = BUILT | CONTRIBUTED
    return sorted(f"{modules[re.sub('[-_.]+', '-', name.split('-')[0]).lower()]} {name}" for name in wheels)


def missing_wheels(lines: str) -> list[str]:
    """Of modules.txt, the wheels whose module this Python cannot import."""
    pairs = [line.split() for line in lines.splitlines()]
    return [f"wheels/{wheel}" for module, wheel in pairs if module == ALWAYS or not importable(module)]


def importable(module: str) -> bool:
    """Tried, not looked for: on machines without a screen a cv2 that is installed often fails for want of libGL."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except Exception:
        return False
    return True


def checked_size(kit: Path) -> int:
    """Bytes of all files."""
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        largest = max((path for path in kit.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raise KitError(
            f"expected at most {LARGEST_BYTES:,} bytes, found {size:,}, of which {largest.stat().st_size:,} are "
            f"{largest.relative_to(kit)}; leave something out"
        )
    return size


def run(command: Sequence[str | Path], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command printed. Raises KitError with its last lines."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        raise KitError(f"expected the command {words[0]}, found none; install it") from None
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise KitError(
            f"expected `{' '.join(words)}` to succeed, found status {done.returncode}; see what it said:\n{last}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
