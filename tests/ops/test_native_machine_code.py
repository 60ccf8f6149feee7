"""The machine code of csrc/ for Hopper, as CMake builds it: registers, spills, instructions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVICTIONS = {f"evict_and_rephase_{suffix}" for suffix in ("bf16", "f16", "f32")}
CONVOLUTIONS = {f"causal_conv3d_{columns}_{suffix}" for columns in (96, 192) for suffix in ("bf16", "f16")}
MOST_REGISTERS = 80  # of a thread, with which 3 blocks of 256 threads still share a multiprocessor
COPY_REGISTERS, PRODUCT_REGISTERS = 24, 240  # of a thread that copies, and of one that multiplies
START_REGISTERS = (COPY_REGISTERS + 2 * PRODUCT_REGISTERS) // 3  # of a thread, whatever it does


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The fatbin for Hopper and for the oldest architecture, as CMake builds it, and what was said."""
    return build_fatbin(tmp_path_factory.mktemp("build"))


def build_fatbin(folder: Path, *options: str) -> tuple[Path, str]:
    missing = [tool for tool in ("cmake", "nvcc") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    fatbin = folder / "native.fatbin"
    options = ("-DRFENGINE_CUDA_ARCHS=80;90a", f"-DRFENGINE_FATBIN={fatbin}", *options)
    said = ""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
        ["cmake", "--build", str(folder)],
    ):
        finished = subprocess.run(command, check=True, text=True, capture_output=True)
        said += finished.stdout + finished.stderr
    return fatbin, said


def codes_of(fatbin: Path, arch: str) -> dict[str, str]:
    """The machine code of every kernel that there is for `arch`."""
    found = importlib.util.find_spec("triton")
    places = [
        Path(place) / "backends/nvidia/bin" for place in (found and found.submodule_search_locations) or ()
    ]
    tool = shutil.which("cuobjdump", path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    command = [tool, "-sass", "-arch", arch, str(fatbin)]
    listing = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL))


@pytest.fixture(scope="module")
def codes(build: tuple[Path, str]) -> dict[str, str]:
    return codes_of(build[0], "sm_90a")


def test_kernels_stay_in_their_registers_without_spills(build: tuple[Path, str]) -> None:
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    reports = {found[0]: found[1:] for found in entry.findall(build[1])}
    assert set(reports) == EVICTIONS | CONVOLUTIONS
    for name, (stack, stores, loads, registers, rest) in reports.items():
        assert (stack, stores, loads) == ("0", "0", "0"), name
        if name in EVICTIONS:
            assert int(registers) <= MOST_REGISTERS, name
        else:  # with fewer, the warps that multiply would wait for ever for those they take
            assert int(registers) == START_REGISTERS, name
        assert "smem" not in rest, name  # that of the convolutions is dynamic
    assert "serialized" not in build[1], "products that wait for each other"


def test_the_eviction_moves_16_bytes_and_fuses_no_rounding_away(codes: dict[str, str]) -> None:
    for name in EVICTIONS:
        code = codes[name]
        assert len(re.findall(r"LDG\.E\.128", code)) >= 4, name
        assert len(re.findall(r"STG\.E\.128", code)) >= 3, name
        assert not re.search(r"\b(LDL|STL|FFMA)\b", code), name


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_the_convolution_multiplies_from_shared_memory_without_waits_in_between(
    name: str, codes: dict[str, str]
) -> None:
    lines = [line for line in codes[name].splitlines() if re.match(r"\s+/\*[0-9a-f]{4}\*/", line)]
    columns = name.split("_")[2]
    products = [line for line in lines if "HGMMA" in line]
    # three taps of a slab; 8 products each, of 16 channels by 64 pixels; one in eight ends a group
    assert len(products) == 24
    assert all(f"HGMMA.64x{columns}x16.F32" in line and "gdesc[" in line for line in products)
    assert sum("gsb0" in line for line in products) == 3
    waits = [line for line in lines if "WARPGROUP.DEPBAR" in line]
    assert [re.search(r"gsb0, (0x\d)", line)[1] for line in waits] == ["0x1"] * 3 + ["0x0"]
    assert sum("WARPGROUP.ARRIVE" in line for line in lines) == 3
    assert not any(re.search(r"\b(LDL|STL|CALL)\b", line) for line in lines)


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_the_warps_of_a_convolution_stay_in_the_registers_they_are_given(
    name: str, codes: dict[str, str]
) -> None:
    lines = codes[name].splitlines()
    (given,) = [index for index, line in enumerate(lines) if f"DEALLOC.CTAPOOL {COPY_REGISTERS:#x}" in line]
    (taken,) = [line for line in lines if "TRY_ALLOC.CTAPOOL" in line]
    assert f"UP0, {PRODUCT_REGISTERS:#x}" in taken
    copies = [index for index, line in enumerate(lines) if "UTMALDG" in line]
    assert {re.search(r"UTMALDG\.(\dD)", lines[index])[1] for index in copies} == {"2D", "4D"}
    assert given < copies[0], "what copies has given its registers back"
    assert most_register(lines[given : copies[-1] + 1]) < COPY_REGISTERS
    assert most_register(lines) < PRODUCT_REGISTERS


def most_register(lines: list[str]) -> int:
    return max(int(number) for line in lines for number in re.findall(r"\bR(\d+)\b", line))


def test_the_report_has_every_kernel(build: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from bench import native_report

    assert native_report.run(native_report.Options(fatbin=build[0])) == 0
    assert re.match(r"sm_90a, nvcc \d+\.\d+\ncase: kernel ", capsys.readouterr().out)
    kernels = {kernel["kernel"]: kernel for kernel in native_report.describe_fatbin(build[0])}
    assert kernels.keys() == EVICTIONS | CONVOLUTIONS
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0 and kernel["blocks"] == (3 if name in EVICTIONS else 1), name
        assert kernel["products"] == ((0, 0) if name in EVICTIONS else (24, 0)), name
        # a slab and the three taps that are multiplied by it; the compiler repeats both
        assert kernel["tensor_copies"] == 0 if name in EVICTIONS else kernel["tensor_copies"] >= 4, name
        assert kernel["shared_bytes"] <= 227 * 1024 and bool(kernel["shared_bytes"]) == (name in CONVOLUTIONS)
    with pytest.raises(RuntimeError, match="there is no absent.fatbin; cmake -S . -B build"):
        native_report.run(native_report.Options(fatbin=Path("absent.fatbin")))


def test_other_gpus_have_what_is_made_for_all(build: tuple[Path, str]) -> None:
    assert set(codes_of(build[0], "sm_80")) == EVICTIONS


def test_a_toolkit_without_the_architecture_builds_the_rest(tmp_path: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    older = tmp_path / "nvcc"
    older.write_text(
        f'#!/bin/sh\ncase "$*" in *90a*) echo "nvcc fatal: Unsupported gpu architecture" >&2; exit 1;; esac\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    older.chmod(0o755)
    fatbin, said = build_fatbin(tmp_path, f"-DCMAKE_CUDA_COMPILER={older}")
    assert "this nvcc does not know sm_90a; it is left out" in said
    assert "sm_80" in said and set(codes_of(fatbin, "sm_80")) == EVICTIONS
