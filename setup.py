"""Builds the C extensions; everything else about the package is in pyproject.toml."""

import shutil
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError


def pkg_config(option: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["pkg-config", option, "libjpeg", "zlib"], capture_output=True, text=True)


def flags() -> tuple[list[str], list[str]]:
    """What pkg-config knows, for compiler and linker; without it the compiler's own paths have to do."""
    if shutil.which("pkg-config") and pkg_config("--exists").returncode == 0:
        return pkg_config("--cflags").stdout.split(), pkg_config("--libs").stdout.split()
    return [], ["-ljpeg", "-lz"]


NEEDS = {
    "softshard.pipeline.images._jpeg": "the headers of libjpeg-turbo and zlib; install libjpeg-dev and zlib1g-dev "
    "(Debian, Ubuntu), libjpeg-turbo-devel and zlib-devel (Fedora), jpeg-turbo (Homebrew) or libjpeg-turbo (conda)",
    "softshard.trainer.students.fused._depthwise": "vector extensions; install GCC or Clang",
}


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError):
            raise SystemExit(
                f"softshard: {ext.sources[0]}: expected a C compiler and {NEEDS[ext.name]}; found that it does not "
                "build (the compiler's message is above)"
            ) from None


compiler, linker = flags()
jpeg = Extension(
    "softshard.pipeline.images._jpeg", ["pipeline/images/_jpeg.c"], extra_compile_args=compiler, extra_link_args=linker
)
depthwise = Extension(
    "softshard.trainer.students.fused._depthwise",
    ["trainer/students/fused/_depthwise.c"],
    depends=["trainer/students/fused/_depthwise.h"],
    extra_compile_args=["-O3"],
)
setup(ext_modules=[jpeg, depthwise], cmdclass={"build_ext": Build})
