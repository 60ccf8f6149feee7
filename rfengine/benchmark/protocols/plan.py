"""What is to be measured, planned and refused before anything is loaded."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass, replace

import torch

from rfengine.benchmark.agreement import twice
from rfengine.benchmark.measured_engine import device_of, model_of, open_checkpoint
from rfengine.benchmark.options import ThroughputOptions
from rfengine.benchmark.protocols.protocol import Protocol, Setting
from rfengine.benchmark.protocols.table import PROTOCOLS
from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.systems import configured
from rfengine.config import EngineConfig, RuntimeConfig
from rfengine.costs.memory import memory_needs, stream_bytes
from rfengine.costs.shapes import require_stream
from rfengine.files import require_writable
from rfengine.grid import LatentGrid
from rfengine.limits import check_options, shown
from rfengine.memory import require_memory
from rfengine.runtime.decoders import require_decoder
from rfengine.runtime.options import decode_device, model_dtype, runtime_switches
from rfengine.video import check_size

ALL = "all"
GIB = 2**30
_FILE_BYTES = 1.5  # of a pixel as it enters the encoder (4:2:0), which noise hardly shrinks


@dataclass(frozen=True, slots=True)
class Plan:
    """One protocol and the engines that it is measured on: with and without CUDA graphs where they are on by
    default, else as the user says."""

    protocol: Protocol
    settings: tuple[Setting, ...]


def planned(options: ThroughputOptions) -> list[Plan]:
    """The protocols of `options`, each once. No weights are loaded; of what is written, only the directories
    for --json are made.

    Raises ValueError for a protocol that is none, for an option that does not go with it and for a --json
    that cannot be written, RuntimeError where the device, a package, memory or the disk does not do.
    """
    check_options(options)
    protocols = [PROTOCOLS[name] for name in protocol_names(options.protocol)]
    for name in ("compare", "plot"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} is {getattr(options, name)} beside --protocol {protocols[0].name}; it is for "
                "rfengine bench without --protocol"
            )
    for protocol in protocols:
        _refuse_contradictions(protocol, options)
    device = device_of(options.device)
    checkpoint = open_checkpoint(model_of(options, device), options)
    plans = [_plan(protocol, options, device) for protocol in protocols]
    for plan in plans:
        _require_possible(plan, checkpoint, device)
    if options.json is not None and str(options.json) != "-":
        require_writable(options.json, "--json")
    return plans


def protocol_names(given: tuple[str, ...]) -> list[str]:
    """The names in --protocol, each once, in the order they were asked for. Raises ValueError for another."""
    names: dict[str, None] = {}
    for name in (part.strip() for text in given for part in text.split(",")):
        if name != ALL and name not in PROTOCOLS:
            raise ValueError(f"--protocol is {shown(name)}; use {ALL} or any of {', '.join(PROTOCOLS)}")
        names |= dict.fromkeys(PROTOCOLS if name == ALL else [name])
    return list(names)


def _refuse_contradictions(protocol: Protocol, options: ThroughputOptions) -> None:
    """Raises ValueError for an option that says otherwise than the protocol."""
    runtime, own = options.runtime, []
    if protocol.decodes and not options.decode:
        own.append(("--no-decode", "makes frames"))
    if protocol.system is not None and options.system not in (None, protocol.system):
        own.append((f"--system {options.system}", f"is measured with the system {protocol.system}"))
    # the default cannot be told from --vae full, which the tiny decoder takes the place of
    if protocol.vae is not None and runtime.vae not in ("full", protocol.vae):
        own.append((f"--vae {runtime.vae}", f"is measured with the {protocol.vae} decoder"))
    if protocol.vae == "tiny" and runtime.vae_precision != "default":
        own.append((f"--vae-precision {runtime.vae_precision}", "is measured with the tiny decoder"))
    if runtime.preset is not None:
        own.append((f"--preset {runtime.preset}", "is measured under options that are given one by one"))
    for option, words in own:
        raise ValueError(
            f"{option} contradicts the protocol {protocol.name}, which {words}; leave out one of the two"
        )


def _plan(protocol: Protocol, options: ThroughputOptions, device: torch.device) -> Plan:
    runtime = options.runtime if protocol.vae is None else replace(options.runtime, vae=protocol.vae)
    graphs = runtime_switches(runtime, device)["graphs"].on
    choices = (True, False) if graphs and runtime.graphs is None else (graphs,)
    settings = [
        replace(
            options,
            system=protocol.system or options.system,
            decode=protocol.decodes,
            runtime=replace(runtime, graphs=choice),
        )
        for choice in choices
    ]
    made = (Setting(each, protocol.context_pass, protocol.encodes_text) for each in settings)
    return Plan(protocol, tuple(made))


def _require_possible(plan: Plan, checkpoint: Checkpoint, device: torch.device) -> None:
    protocol, options = plan.protocol, plan.settings[0].options
    require_stream(checkpoint.config)
    config = checkpoint.config if options.system is None else configured(checkpoint.config, options.system)
    config = replace(config, runtime=options.runtime)
    grid = LatentGrid.of(config, options.height, options.width)
    if protocol.decodes:
        require_decoder(options.runtime, decode_device(options.runtime, device))
    if options.runtime.vae == "tiny" and not checkpoint.has("tiny_vae"):
        raise ValueError(
            f"{checkpoint.path} has no tiny decoder (taew2_1.pth), which the protocol {protocol.name} is "
            "measured with; put it there, or choose other protocols"
        )
    if protocol.writes:
        _require_video_file(protocol, grid)
    dtype = model_dtype(options.runtime, options.dtype, device)
    _require_fits(protocol, checkpoint, config, grid, dtype, device)


def _require_video_file(protocol: Protocol, grid: LatentGrid) -> None:
    """Raises ValueError for a size that no MP4 has, RuntimeError where none can be written."""
    check_size(grid.height, grid.width)
    if importlib.util.find_spec("av") is None:
        raise RuntimeError(
            f"the protocol {protocol.name} writes a video and PyAV is not installed; pip install av, or "
            "choose other protocols"
        )
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the protocol {protocol.name} writes a video and no temporary folder can be written; name one "
            "in TMPDIR"
        ) from error
    needed, free = protocol.frames * grid.height * grid.width * _FILE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"the protocol {protocol.name} writes a video of up to {needed / GIB:.1f} GiB to {folder}, where "
            f"{free / GIB:.1f} GiB are free; name a folder with more in TMPDIR"
        )


def _require_fits(
    protocol: Protocol,
    checkpoint: Checkpoint,
    config: EngineConfig,
    grid: LatentGrid,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises RuntimeError where memory cannot hold the weights and, beside them, one after another: the text
    encoder, the transformer and cache of the reference in twice the precision, with which the engine is
    compared first, and the engine's stream. In FP8 the engine has a second set of weights."""
    needs = _memory_needs(_of_memory(config), grid, dtype)
    truth = _memory_needs(replace(config, runtime=RuntimeConfig()), grid, twice(dtype))  # which has no FP8
    weights = needs["transformer"] + needs["transformer_fp8"] + needs["vae"]
    text = needs["text_encoder"]
    if checkpoint.directory is None:  # random weights have none
        text = 0
    elif protocol.encodes_text:
        weights, text = weights + text, 0
    reference = truth["transformer"] + stream_bytes(truth) - truth["vae_state"]
    needed = weights + max(text, reference, stream_bytes(needs) + needs["vae_buffers"])
    require_memory(
        needed, device,
        f"the protocol {protocol.name}, {grid.height} x {grid.width} pixels with a window of "
        f"{config.cache.window_frames} latent frames and a reference in {twice(dtype)} to compare with,",
        "choose a smaller --height and --width, or protocols with a smaller window",
    )  # fmt: skip


def _of_memory(config: EngineConfig) -> EngineConfig:
    """`config` with what its memory depends on alone, so that it is reckoned once a session."""
    runtime = config.runtime
    names = (
        "precision", "sixteen_bit_passes", "text_encoder", "text_weights", "block_weights", "block_buffers",
    )  # fmt: skip
    runtime = RuntimeConfig(**{name: getattr(runtime, name) for name in names})
    return replace(config, runtime=runtime)


@functools.cache
def _memory_needs(config: EngineConfig, grid: LatentGrid, dtype: torch.dtype) -> dict[str, int]:
    return memory_needs(config, grid, dtype)
