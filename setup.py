"""Builds the C extension; everything else about the package is in pyproject.toml."""

import shutil
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError


def flags(option: str) -> list[str]:
    """What pkg-config knows of libjpeg; without it the compiler's own paths have to do."""
    command = ["pkg-config", option, "libjpeg", "zlib"]
    if shutil.which(command[0]) and subprocess.run([*command[:1], "--exists", *command[2:]]).returncode == 0:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [] if option == "--cflags" else ["-ljpeg", "-lz"]


class BuildJpeg(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError):
            raise SystemExit(
                "softshard: pipeline/_jpeg.c: expected a C compiler and the headers of libjpeg-turbo and zlib, found "
                "that it does not build (the compiler's message is above); install libjpeg-dev and zlib1g-dev (Debian, "
                "Ubuntu), libjpeg-turbo-devel and zlib-devel (Fedora), jpeg-turbo (Homebrew) or libjpeg-turbo (conda)"
            ) from None


extension = Extension(
    "pipeline._jpeg", ["pipeline/_jpeg.c"], extra_compile_args=flags("--cflags"), extra_link_args=flags("--libs")
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildJpeg})
