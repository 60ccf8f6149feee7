"""What pyproject.toml cannot say: the packages, the data that travels in the wheel, and the native part.

Whether csrc/ is compiled is decided from RFENGINE_NATIVE and from which tools there are, before anything
is done; once it is compiled, an error of the compiler is an error of the installation.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, find_namespace_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
FATBIN = ROOT / "rfengine" / "_native.fatbin"
OLDEST_CMAKE = (3, 19)


def cmake_version() -> tuple[int, ...]:
    cmake = shutil.which("cmake")
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout if cmake else ""
    found = re.search(r"version (\d+)\.(\d+)", answer)
    return tuple(map(int, found.groups())) if found else ()


def missing_tools() -> list[str]:
    """What the native part needs and this machine has not."""
    needs = {
        "cmake 3.19 or newer": cmake_version() >= OLDEST_CMAKE,
        "make": shutil.which("make"),
        "nvcc of the CUDA toolkit": shutil.which("nvcc"),
        "a C++ compiler": shutil.which("c++") or shutil.which("g++"),
    }
    return [name for name, found in needs.items() if not found]


def reason_without_native() -> str:
    """Why the native part is left out, or "" to build it.

    RFENGINE_NATIVE: auto builds where the tools are, 1 builds or fails, 0 never builds.
    """
    choice = os.environ.get("RFENGINE_NATIVE", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"RFENGINE_NATIVE is {choice!r}; it must be auto, 1 or 0")
    if choice == "0":
        return "RFENGINE_NATIVE is 0"
    missing = ", ".join(missing_tools())
    if missing and choice == "1":
        sys.exit(f"RFENGINE_NATIVE is 1 but this machine lacks {missing}; install that, or leave it at auto")
    return f"this machine lacks {missing}" if missing else ""


LEFT_OUT = reason_without_native()


class BuildNative(Command):
    """Compiles csrc/ into rfengine/_native.fatbin, before the files of the package are gathered."""

    description = "compile the CUDA kernels of csrc/"
    user_options = []
    editable_mode = False  # an editable installation takes the same file

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        if LEFT_OUT:
            FATBIN.unlink(missing_ok=True)  # one of an older csrc/ would not fit its callers
            print(f"rfengine: the native CUDA kernels are left out: {LEFT_OUT}")  # noqa: T201
            return
        cache = BUILD / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(BUILD)  # this tree was moved, which CMake refuses
        compiler = f"-DCMAKE_CUDA_COMPILER={shutil.which('nvcc')}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Unix Makefiles", compiler]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(BUILD)], check=True)

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*.cu*")))]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWithNative(build):
    sub_commands = [("build_native", None), *build.sub_commands]


setup(
    packages=find_namespace_packages(
        include=["rfengine", "rfengine.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={
        "rfengine": [
            "weights/**/*.safetensors",
            "weights/**/*.json",
            "serving/static/*",
            "_native.fatbin",
        ]
    },  # fmt: skip
    cmdclass={"build": BuildWithNative, "build_native": BuildNative},
)
