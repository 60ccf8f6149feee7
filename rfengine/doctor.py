"""Doctor: a report of versions, the GPU, memory, and each backend on or off with the reason.

Nothing that is absent makes it fail: an unknown value is None, and the text says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rfengine
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.directories import checkpoint_directory
from rfengine.checkpoint.lora import Lora, load_loras
from rfengine.checkpoint.manifest import MANIFEST_FILE, differences
from rfengine.checkpoint.shapes import expected_shapes
from rfengine.config import DTypeName, EngineConfig, RuntimeConfig
from rfengine.costs.memory import fp8_weight_bytes, lora_bytes, memory_needs, window_fp8_bytes
from rfengine.costs.window import window_needs
from rfengine.grid import LatentGrid
from rfengine.memory import free_memory
from rfengine.ops import choose_ops
from rfengine.ops.backends import backend_reasons, fp8_absence
from rfengine.presets import PRESETS
from rfengine.runtime.card_presets import GIB
from rfengine.runtime.card_report import card_lines, card_report
from rfengine.runtime.decoder_precision import plan_precision
from rfengine.runtime.decoders import TIERS, absences
from rfengine.runtime.options import model_dtype, runtime_switches
from rfengine.tuning.autotune import cached_decisions

MIB = 2**20
_REQUIRED = (
    "torch", "numpy", "safetensors", "transformers", "tokenizers", "av", "pillow", "tqdm", "tyro", "ftfy",
)  # fmt: skip
_OPTIONAL = (
    "triton", "flash-attn", "pycuda", "cuda-core", "nvtx", "tensorrt", "onnx", "onnxruntime",
    "tensorboard", "matplotlib",
)  # fmt: skip
_HOW_TO_GET = {
    "pycuda": "it has no wheel: build its source archive without cuRAND (README), or take cuda-core",
    "cuda-core": "pip install cuda-core cuda-bindings",
    "nvtx": "pip install rfengine[native]",
    **dict.fromkeys(("tensorrt", "onnx", "onnxruntime"), "pip install rfengine[tensorrt]"),
}  # others: pip install NAME
_DRIVER_TIMEOUT = 10.0  # seconds that nvidia-smi gets


def examine(
    model: str = "tiny",
    height: int | None = None,
    width: int | None = None,
    dtype: DTypeName | None = None,
    loras: Sequence[Lora] = (),
    gpu_memory: float | None = None,
) -> dict[str, Any]:
    """The report as plain JSON values; sizes are bytes.

    model: a preset or a checkpoint directory, whose memory is computed at height x width pixels in dtype and
    whose files are read and compared with their manifest. loras: read, and their memory computed. gpu_memory:
    GiB of a card that presets are planned for.
    Raises ValueError for an unknown model, a size that is no multiple of the patch and a LoRA of another
    model, RuntimeError where the configuration is damaged and the manifest knows it.
    """
    files = _files(model)
    checkpoint = _open(model, files)
    config = checkpoint.config
    grid = LatentGrid.of(config, height, width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = model_dtype(config.runtime, dtype, torch.device(device))
    loaded = load_loras(loras, expected_shapes(config.model))
    decoding = plan_precision(config.runtime, device, own)
    needs_of = memory_needs if config.diffusion_forcing is None else window_needs
    needs = needs_of(config, grid, own, decoding.dtype)
    return {
        "rfengine": rfengine.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "driver": driver_version(),
        "gpus": _gpus(),
        "packages": {name: version_of(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "h264": _h264(),
        "backends": {
            "device": device, "reasons": backend_reasons(device),
            "auto": choose_ops("auto", device, dtype=own).choice,
        },
        "runtime": {
            "device": device, "switches": _switches(config.runtime, device),
            "decoders": {
                kind: {"tier": TIERS[kind], "reason": reason} for kind, reason in absences(checkpoint).items()
            },
            "vae_precision": str(decoding),
            "products": {
                "precision": config.runtime.precision, "in_fp8": _products_in_fp8(config, grid, own, device),
            },
            "autotuned": [str(decision) for decision in cached_decisions(device)],
        },
        "memory": {
            "model": config.name, "height": grid.height, "width": grid.width,
            "dtype": str(own).removeprefix("torch."), "device": device, "needs": needs,
            "host": lora_bytes(loaded, config.model, own) if loaded else {},
            "free": free_memory(torch.device(device)),
        },
        "files": files,
        "cards": _cards(checkpoint, grid, gpu_memory, dtype, bool(loras), height is None and width is None),
    }  # fmt: skip


def _cards(
    checkpoint: Checkpoint,
    grid: LatentGrid,
    gpu_memory: float | None,
    dtype: DTypeName | None,
    has_loras: bool,
    may_shrink: bool,
) -> dict[str, Any] | None:
    if gpu_memory is None:
        return None
    config = dataclasses.replace(checkpoint.config, height=grid.height, width=grid.width)
    return card_report(checkpoint, config, int(gpu_memory * GIB), dtype, has_loras, may_shrink)


def _files(model: str) -> dict[str, str] | None:
    """How each file differs from the manifest of `model`, "" where it does not; None without a manifest."""
    if model != "tiny" and model in PRESETS:
        return None
    return differences(checkpoint_directory(model))


def _open(model: str, files: dict[str, str] | None) -> Checkpoint:
    """The checkpoint `model`; where it is refused and files differ, RuntimeError says both."""
    if model != "tiny" and model in PRESETS:
        return Checkpoint.random(PRESETS[model])
    try:
        return Checkpoint.open(model)
    except ValueError as error:
        wrong = [f"{name} {reason}" for name, reason in (files or {}).items() if reason]
        if not wrong:
            raise
        raise RuntimeError(f"{error}; of the files in {MANIFEST_FILE}, {', '.join(wrong)}") from error


def _switches(runtime: RuntimeConfig, device: str) -> dict[str, Any]:
    """Which runtime options are on by default, and the ranges for a profiler, each with its reason."""
    switches = runtime_switches(runtime, torch.device(device))
    report = {name: dataclasses.asdict(switch) for name, switch in switches.items()}
    absences = [
        "ranges need a CUDA device" * (device != "cuda"),
        f"absent: {_how_to_get('nvtx')}" * (version_of("nvtx") is None),
    ]
    absence = "; ".join(filter(None, absences))
    report["nvtx"] = {"on": not absence, "reason": absence or "a profiler shows the parts of each chunk"}
    return report


def _products_in_fp8(
    config: EngineConfig, grid: LatentGrid, dtype: torch.dtype, device: str
) -> dict[str, dict[str, Any]]:
    """For each precision with FP8 why it cannot be here, "" where it can; and the bytes that it adds to the
    weights and to each stream."""
    absence, found = fp8_absence(torch.device(device)), {}
    for precision in ("fp8", "fp8-attention"):
        reason, of_stream = absence, 0
        try:
            runtime = dataclasses.replace(config.runtime, precision=precision)
            changed = dataclasses.replace(config, runtime=runtime)
            if config.diffusion_forcing is None:
                of_stream = window_fp8_bytes(changed, grid)
            elif precision == "fp8-attention":
                reason = reason or "it is for the window of a stream, and this model streams nothing"
        except ValueError as error:
            reason = reason or str(error)
        weights = fp8_weight_bytes(config.model, dtype)
        found[precision] = {"reason": reason, "weights": weights, "stream": of_stream}
    return found


def cpu_name() -> str:
    """The processor's own name where the system reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def driver_version() -> str | None:
    """The driver of the GPUs; None where no nvidia-smi answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "total": total, "free": free})
    return gpus


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _how_to_get(package: str) -> str:
    return _HOW_TO_GET.get(package, f"pip install {package}")


def _h264() -> dict[str, Any]:
    """Versions of the FFmpeg libraries inside PyAV, and whether they can write H.264."""
    try:
        import av
    except ImportError as error:
        return {"libx264": False, "reason": f"PyAV cannot be imported ({error}); pip install av"}
    try:
        av.Codec("libx264", "w")
    except ValueError:  # UnknownCodecError
        return {"libx264": False, "reason": "this PyAV has no libx264; pip install av gives one that has"}
    versions = {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    return {"libx264": True, "libraries": versions}


def render(report: dict[str, Any]) -> str:
    """The report of `examine` as text."""
    sections = [
        _machine_lines, _package_lines, _backend_lines, _runtime_lines, _memory_lines, _card_lines,
        _file_lines
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in (section(report) for section in sections) if lines)


def _machine_lines(report: dict[str, Any]) -> list[str]:
    cpu = report["cpu"]
    gpus = [
        f"GPU      {gpu['name']}, sm {gpu['capability']}, {_mib(gpu['free'])} free of {_mib(gpu['total'])}"
        for gpu in report["gpus"]
    ]
    return [
        f"rfengine {report['rfengine']}, Python {report['python']}, {report['system']}",
        f"torch    {report['torch']['version']}, CUDA {report['torch']['cuda'] or 'not built in'}",
        f"driver   {report['driver'] or 'absent: no nvidia-smi answers'}",
        f"CPU      {cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} threads used by torch",
        *(gpus or ["GPU      none that torch can use"]),
    ]


def _rows(rows: dict[str, str]) -> list[str]:
    return [f"  {name:<13} {text}" for name, text in rows.items()]


def _on_or_off(reason: str) -> str:
    return f"off: {reason}" if reason else "on"


def _package_lines(report: dict[str, Any]) -> list[str]:
    h264 = report["h264"]
    libraries = ", ".join(f"{name} {version}" for name, version in h264.get("libraries", {}).items())
    rows = {name: version or f"absent: {_how_to_get(name)}" for name, version in report["packages"].items()}
    video = f"in PyAV, with {libraries}" if h264["libx264"] else h264["reason"]
    return ["packages", *_rows(rows | {"libx264": video})]


def _backend_lines(report: dict[str, Any]) -> list[str]:
    backends = report["backends"]
    rows = {name: _on_or_off(reason) for name, reason in backends["reasons"].items()}
    lines, chosen = [f"backends on {backends['device']}", *_rows(rows)], backends["auto"]
    for name in sorted(set(chosen.values())):
        taken = [op for op, backend in chosen.items() if backend == name]
        lines.append(
            f"  auto takes {name} for {'every op' if len(taken) == len(chosen) else ', '.join(taken)}"
        )
    return lines


def _runtime_lines(report: dict[str, Any]) -> list[str]:
    runtime = report["runtime"]
    switches = {
        name: f"{'on' if switch['on'] else 'off'}: {switch['reason']}"
        for name, switch in runtime["switches"].items()
    }
    decoders = {
        name: f"{decoder['tier']}, {_on_or_off(decoder['reason'])}"
        for name, decoder in runtime["decoders"].items()
    }
    return [
        f"runtime on {runtime['device']}, where nothing else is asked for", *_rows(switches),
        *(f"  autotuned: {decision}" for decision in runtime["autotuned"]), *_product_lines(runtime),
        "decoders", *_rows(decoders | {"precision": runtime["vae_precision"]}),
    ]  # fmt: skip


def _product_lines(runtime: dict[str, Any]) -> list[str]:
    """What FP8 does here, or why it does not."""
    products, on_cuda = runtime["products"], runtime["device"] == "cuda"
    how = "e4m3 in the tensor cores" if on_cuda else "emulated on a CPU, which is slower"
    rows = {"precision": products["precision"]}
    for name, found in products["in_fp8"].items():
        stream = f", {_mib(found['stream'])} more for each stream" * (found["stream"] > 0)
        more = f"{how}, {_mib(found['weights'])} of weights more{stream}"
        rows[name] = f"off: {found['reason']}" if found["reason"] else f"available: {more}"
    return ["products of the transformer", *_rows(rows)]


def _memory_lines(report: dict[str, Any]) -> list[str]:
    memory = report["memory"]
    needs, free = memory["needs"], memory["free"]
    size = f"{memory['height']} x {memory['width']} pixels"
    shown = {name.replace("_", " "): _mib(needed) for name, needed in needs.items()}
    shown[f"free on {memory['device']}"] = "unknown" if free is None else _mib(free)
    without = "" if "activations" in needs else ", without activations"
    lines = [f"memory of {memory['model']} at {size} in {memory['dtype']}{without}"]
    host = {name.replace("_", " "): _mib(size) for name, size in memory["host"].items()}
    lines += [f"  {name:<16} {amount:>12}" for name, amount in shown.items()]
    lines += [f"  {name:<16} {amount:>12}, in host memory" for name, amount in host.items()]
    on_host = sum(memory["host"].values()) if memory["device"] == "cpu" else 0
    if free is not None and free < needs["total"] + on_host:
        lines.append(
            "  this does not fit: take a smaller model or size, 16 bits, or a preset, of which --gpu-memory "
            "says which fits"
        )
    return lines


def _card_lines(report: dict[str, Any]) -> list[str]:
    return card_lines(report["cards"]) if report["cards"] else []


def _file_lines(report: dict[str, Any]) -> list[str]:
    files = report["files"]
    if files is None:
        return []
    wrong = [f"  {name} {reason}" for name, reason in files.items() if reason]
    return [f"files against {MANIFEST_FILE}", *(wrong or [f"  ok: all {len(files)} are as it says"])]


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.1f} MiB"
