"""`rfengine serve`: a server with a page, realtime sessions and video jobs."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Annotated

import torch
from tyro.conf import OmitArgPrefixes, UseAppendAction

from rfengine.checkpoint.checkpoint import Checkpoint
from rfengine.checkpoint.systems import SystemName
from rfengine.cli.lora_options import LoraOptions
from rfengine.cli.terminal import find_device
from rfengine.config import Backend, DTypeName, RuntimeConfig
from rfengine.limits import Range, check_options
from rfengine.pipeline import Pipeline

if TYPE_CHECKING:
    from rfengine.serving.server import ServerOptions

_OPEN_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a page, realtime sessions over a WebSocket, and video jobs in the shape of OpenAI's API."""

    model: str = "tiny"
    """A checkpoint directory, or tiny, which comes with the package."""
    system: SystemName | None = None
    """The cache and the denoising steps of a published system, in place of the checkpoint's own."""
    host: str = "127.0.0.1"
    """Address to listen at; any but loopback needs keys."""
    port: Annotated[int, Range(1, 65535)] = 8000
    api_key_file: Path | None = None
    """Access keys, one on each line, in a file that only you can read; or RFENGINE_API_KEYS, with commas."""
    insecure: bool = False
    """Listen beyond loopback without keys: everybody who reaches the port can use the machine."""
    max_sessions: Annotated[int, Range(1, 10_000)] = 16
    """Sessions at once, paused ones and running jobs included."""
    connections_per_key: Annotated[int, Range(1, 65_536)] = 16
    """Sessions that clients with one key may hold at once; without keys, those of one address."""
    max_connections: Annotated[int, Range(1, 65_536)] = 256
    """Connections at once of all clients, requests for files included."""
    memory_gb: Annotated[float | None, Range(0.001, 10_000)] = None
    """Device memory for sessions, beside the model; most of what is free where nothing is given."""
    host_memory_gb: Annotated[float, Range(0.001, 10_000)] = 2.0
    """Host memory for paused sessions and kept points."""
    data_directory: Path | None = None
    """Where recordings and videos are kept; below ~/.local/state/rfengine where nothing is given."""
    disk_gb: Annotated[float, Range(0.001, 1_000_000)] = 8.0
    """Quota of the data directory; half is for recordings of sessions, half for videos of jobs."""
    allow_origin: UseAppendAction[tuple[str, ...]] = ()
    """Another site whose pages may call, as https://host; may be given several times."""
    allow_host: UseAppendAction[tuple[str, ...]] = ()
    """Another name under which the server is reached without keys; may be given several times."""
    device: str | None = None
    """cpu, cuda or cuda:N; cuda where there is one."""
    dtype: DTypeName | None = None
    """Precision of the weights; bfloat16 on CUDA, float32 on the CPU."""
    backend: Backend | None = None
    """What runs the ops; auto, the default, takes what is fastest here."""
    replicas: Annotated[int, Range(1, 1024)] = 1
    """Copies of the model behind one address, one a GPU, or a share of the cores each on a CPU; more than one
    need rfengine[ray]. Limits of sessions and memory are each replica's own."""
    max_replicas: Annotated[int | None, Range(1, 1024)] = None
    """Start up to so many while jobs or sessions wait."""
    loras: OmitArgPrefixes[LoraOptions] = LoraOptions()
    runtime: OmitArgPrefixes[RuntimeConfig] = RuntimeConfig()
    log_json: bool = False
    """Write the log as one JSON object a line."""
    open_browser: bool = False
    """Open the page in a browser, where this machine has a screen."""


def run(options: ServeOptions) -> int:
    check_options(options)
    _require_packages()
    from rfengine.serving.access import ApiKeys
    from rfengine.serving.json_logs import configure_service_logging
    from rfengine.serving.process import Address, listen, serve
    from rfengine.serving.server import server_options

    several = max(options.replicas, options.max_replicas or 1) > 1
    threads = _replica_threads(options) if several else torch.get_num_threads()
    keys = ApiKeys.from_file(options.api_key_file) if options.api_key_file else ApiKeys.from_environment()
    listener = listen(Address(options.host, options.port, options.insecure), keys)
    # Threads of OpenMP on a second thread of Python would outnumber the cores, and then wait by sleeping:
    # a chunk of tiny takes 1.7 times as long. So the engine's thread alone has any.
    torch.set_num_threads(1)
    configure_service_logging(options.log_json)
    directory = options.data_directory or _state_directory(options.port)
    server = server_options(options, directory, keys, threads)
    if several:
        return _serve_replicas(options, server, listener, threads)
    pipeline = Pipeline.from_pretrained(
        options.model,
        find_device(options.device),
        options.dtype,
        system=options.system,
        backend=options.backend,
        runtime=options.runtime,
        loras=options.loras.loras(),
    )
    _announce(options, pipeline.config.name)
    return serve(pipeline, server, listener)


def _announce(options: ServeOptions, what: str) -> None:
    name = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{'localhost' if options.host in ('127.0.0.1', '0.0.0.0') else name}:{options.port}/"
    print(f"rfengine serves {what}; the page is at {url}  (Ctrl-C stops it)", flush=True)
    if options.open_browser and _has_screen():
        timer = Timer(_OPEN_AFTER_S, webbrowser.open, (url,))
        timer.daemon = True
        timer.start()


def _replica_threads(options: ServeOptions) -> int:
    """Cores of each replica, when all that can be refused beforehand was checked."""
    from rfengine.serving.replicas.local import require_ray
    from rfengine.serving.replicas.plan import threads_of_each

    device = find_device(options.device)
    kind = _kind_of_device() if device is None else str(device)
    most = options.max_replicas or options.replicas
    threads = threads_of_each(kind, options.replicas, most, torch.cuda.device_count(), _cores())
    require_ray()
    return threads


def _kind_of_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve_replicas(
    options: ServeOptions, server: ServerOptions, listener: socket.socket, threads: int
) -> int:
    from rfengine.serving.replicas.local import ReplicatedServer, local_ray
    from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan

    device = options.device or _kind_of_device()
    name = Checkpoint.open(options.model).config.name  # what is no checkpoint is refused here
    most = options.max_replicas or options.replicas
    source = ModelSource(
        options.model, device, options.dtype, options.system, options.backend, options.runtime,
        options.loras.loras(),
    )  # fmt: skip
    plan = ReplicaPlan(source, server, options.replicas, most, threads, log_json=options.log_json)
    several = ReplicatedServer(plan, listener)
    with local_ray(_cores(), torch.cuda.device_count()):
        _announce(options, f"{name} with {options.replicas} replicas")
        return several.run()


def _require_packages() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
        import websockets
    except ImportError as error:
        raise RuntimeError(
            f"the server needs {error.name}, which is not installed; pip install 'rfengine[serve]'"
        ) from error
    del fastapi, prometheus_client, uvicorn, websockets


def _has_screen() -> bool:
    """Whether a browser would have a window; without one a text browser could take over the terminal."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _state_directory(port: int) -> Path:
    """A directory for each port, so that two servers of a user do not meet."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "rfengine" / f"serve-{port}"
