"""The doctor's figures, and that nothing absent makes it fail."""

from __future__ import annotations

import builtins
import dataclasses
import importlib.metadata
import json
import pwd
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rfengine import __version__, doctor
from rfengine.checkpoint.checkpoint import write_config
from rfengine.checkpoint.systems import configured
from rfengine.config import RuntimeConfig
from rfengine.doctor import examine, render
from rfengine.runtime import decoders
from support.models import small_pipeline


def text_of(report: dict[str, Any]) -> str:
    """The text of a report, without the widths of its columns."""
    return "\n".join(" ".join(line.split()) for line in render(report).splitlines())


def test_memory_grows_with_the_size_and_the_dtype() -> None:
    small = examine("wan-1.3b", 240, 416, "bfloat16")["memory"]["needs"]
    large = examine("wan-1.3b", 480, 832, "bfloat16")["memory"]["needs"]
    wide = examine("wan-1.3b", 480, 832, "float32")["memory"]["needs"]
    assert large["keys_values"] == 4 * small["keys_values"]
    assert large["transformer"] == small["transformer"]
    assert all(wide[name] == 2 * large[name] for name in wide.keys() - {"vae", "total"})
    assert large["vae"] < wide["vae"] < 2 * large["vae"]  # the encoder has 32 bits in both


def test_report_is_json_and_names_every_part() -> None:
    report = json.loads(json.dumps(examine()))
    assert report["rfengine"] == __version__
    assert report["torch"]["version"] == torch.__version__
    assert report["backends"]["reasons"]["reference"] == ""
    assert report["backends"]["auto"]["unpatchify"] == "reference"
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["h264"]["libx264"] is True and "libavcodec" in report["h264"]["libraries"]
    memory = report["memory"]
    assert (memory["model"], memory["height"], memory["width"]) == ("tiny", 64, 64)
    assert memory["free"] is None or memory["free"] > 0


def test_checkpoint_directory_is_reckoned_too(tmp_path: Path) -> None:
    write_config(tmp_path, small_pipeline().config)
    memory = examine(str(tmp_path), dtype="float16")["memory"]
    assert (memory["model"], memory["height"], memory["width"]) == ("small", 32, 48)


def test_memory_of_a_diffusion_forcing_model_is_that_of_a_window() -> None:
    report = examine("skyreels-df-1.3b", dtype="bfloat16")
    memory = report["memory"]
    assert (memory["height"], memory["width"]) == (544, 960)
    assert "keys_values" not in memory["needs"] and memory["needs"]["activations"] > 2**30
    assert "memory of skyreels-df-1.3b at 544 x 960 pixels in bfloat16\n" in text_of(report)
    assert "without activations" in text_of(examine("wan-1.3b", dtype="bfloat16"))


def test_text_says_what_is_on_what_is_absent_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_triton(package: str) -> str:
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_triton)
    monkeypatch.setattr(doctor, "backend_reasons", lambda _: {"reference": "", "native": "no GPU here"})
    text = text_of(examine())
    assert "reference on" in text and "native off: no GPU here" in text
    assert "triton absent: pip install triton" in text
    assert "pycuda absent: it has no wheel: build its source archive" in text
    assert f"\ntorch {torch.__version__}, CUDA " in text  # 2.13.0+cu130, where the package is 2.13.0
    assert f"packages\ntorch {version('torch')}\n" in text


def test_text_says_when_the_memory_does_not_suffice() -> None:
    report = examine("wan-14b")
    report["memory"]["free"] = 8 * 2**30
    assert "this does not fit" in render(report)
    report["memory"]["free"] = 2**50
    assert "this does not fit" not in render(report)
    report["memory"]["free"] = None
    assert "unknown" in render(report)


def test_machine_with_nothing_on_it_is_reported_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_av(name: str, *arguments: object, **options: object) -> object:
        if name == "av":
            raise ImportError("libavcodec.so is missing")
        return real_import(name, *arguments, **options)

    def no_package(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    def no_file(self: Path, *arguments: object) -> str:
        raise FileNotFoundError(str(self))

    def no_answer(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(builtins, "__import__", no_av)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(Path, "read_text", no_file)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", no_answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = examine()
    assert report["h264"] == {
        "libx264": False, "reason": "PyAV cannot be imported (libavcodec.so is missing); pip install av",
    }  # fmt: skip
    assert report["driver"] is None and report["gpus"] == [] and report["memory"]["free"] is None
    assert set(report["packages"].values()) == {None}
    assert "libavcodec.so is missing" in render(report)


def test_driver_is_what_nvidia_smi_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, "570.124.06\n570.124.06\n", "")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    assert examine()["driver"] == "570.124.06"


@pytest.mark.gpu
def test_gpu_is_reported_with_its_memory() -> None:
    report = examine()
    gpu = report["gpus"][0]
    assert gpu["name"] == torch.cuda.get_device_name(0) and 0 < gpu["free"] <= gpu["total"]
    assert report["memory"]["device"] == "cuda" and report["memory"]["dtype"] == "bfloat16"


def test_runtime_says_what_is_on_and_why() -> None:
    report = json.loads(json.dumps(examine()))["runtime"]
    on_cuda = torch.cuda.is_available()
    assert report["switches"]["overlap"]["on"] is on_cuda
    place = "cuda" if on_cuda else "a CPU with 1 thread"
    assert report["switches"]["overlap"]["reason"] == f"the default on {place}"
    assert {"graphs", "autotune", "decode_device", "nvtx"} <= set(report["switches"])
    tiers = {kind: decoder["tier"] for kind, decoder in report["decoders"].items()}
    assert tiers == {"full": "lossless", "tensorrt": "lossless", "tiny": "reduced"}


def test_products_say_what_fp8_would_do_here_and_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine("wan-1.3b", dtype="bfloat16")
    products, mib = report["runtime"]["products"], 2**20
    assert products["precision"] == "default"
    if not torch.cuda.is_available():
        assert {each["reason"] for each in products["in_fp8"].values()} == {""}
    added = {
        name: (each["weights"] // mib, each["stream"] // mib) for name, each in products["in_fp8"].items()
    }
    assert added == {"fp8": (1195, 0), "fp8-attention": (1195, 1234)}
    how = "e4m3 in the tensor cores" if torch.cuda.is_available() else "emulated on a CPU, which is slower"
    assert f"fp8-attention available: {how}" in text_of(report)
    assert "1196 MiB of weights more, 1235 MiB more for each stream" in text_of(report)
    assert report["memory"]["needs"]["transformer_fp8"] == report["memory"]["needs"]["window_fp8"] == 0
    monkeypatch.setattr(doctor, "fp8_absence", lambda _: "it is sm_80, and FP8 products need sm_89 or later")
    text = text_of(examine())
    for name in ("fp8", "fp8-attention"):
        assert f"{name} off: it is sm_80, and FP8 products need sm_89 or later" in text


def test_what_has_no_window_to_copy_says_so(tmp_path: Path) -> None:
    found = examine("skyreels-df-1.3b", dtype="bfloat16")["runtime"]["products"]["in_fp8"]
    assert "this model streams nothing" in found["fp8-attention"]["reason"] and not found["fp8"]["reason"]
    write_config(tmp_path, configured(small_pipeline().config, "rolling-forcing"))
    found = examine(str(tmp_path))["runtime"]["products"]["in_fp8"]
    assert "precision is 'fp8-attention' and rolling is" in found["fp8-attention"]["reason"]


def test_a_checkpoint_in_fp8_needs_the_memory_of_it_and_one_in_bf16_its_dtype(tmp_path: Path) -> None:
    config = small_pipeline().config
    for precision, dtype in (("fp8-attention", None), ("bf16", "bfloat16")):
        runtime = RuntimeConfig(precision=precision)
        write_config(tmp_path, dataclasses.replace(config, runtime=runtime))
        report = examine(str(tmp_path))
        needs = report["memory"]["needs"]
        assert (needs["transformer_fp8"] > 0) == (needs["window_fp8"] > 0) == (precision != "bf16")
        assert dtype in (None, report["memory"]["dtype"])
        assert f"precision {precision}\n" in text_of(report)
    assert "transformer fp8" in text_of(report) and "window fp8" in text_of(report)


def test_absent_tensorrt_and_profiler_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_package(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    def no_tensorrt() -> None:
        raise RuntimeError("TensorRT cannot be imported; get it there")

    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(decoders, "import_tensorrt", no_tensorrt)
    text = text_of(examine())
    assert "tensorrt absent: pip install rfengine[tensorrt]" in text
    assert "onnxruntime absent: pip install rfengine[tensorrt]" in text
    assert "absent: pip install rfengine[native]" in text
    assert "tensorrt lossless, off: TensorRT cannot be imported; get it there" in text
    assert "full lossless, on" in text


def test_a_checkpoint_without_a_tiny_decoder_says_so(tmp_path: Path) -> None:
    write_config(tmp_path, small_pipeline().config)
    assert examine(str(tmp_path))["runtime"]["decoders"]["tiny"]["reason"] == f"{tmp_path} has no tiny_vae"


def test_a_user_without_a_home_directory_gets_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "runtime on" in render(examine("tiny"))
