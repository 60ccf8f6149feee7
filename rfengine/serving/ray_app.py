"""The application for Ray Serve: `serve run rfengine.serving.ray_app:app`.

Its options are those of `rfengine serve`, as arguments (`model=DIRECTORY replicas=2`) or in the environment
of the process that builds the application (RFENGINE_SERVE_MODEL, RFENGINE_SERVE_REPLICAS).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rfengine import Lora
from rfengine.config import Backend, DTypeName, RuntimeConfig
from rfengine.config_json import from_dict
from rfengine.serving.access import ApiKeys
from rfengine.serving.replicas.plan import NODE
from rfengine.serving.server import server_options

if TYPE_CHECKING:
    from ray.serve import Application

PREFIX = "RFENGINE_SERVE_"


def _listed(value: object) -> object:
    """The entries of a text with commas between them."""
    return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class AppOptions(BaseModel):
    """The options, named as those of `rfengine serve`; allow_origin, allow_host and lora have commas between
    their entries, and runtime is a JSON object of RuntimeConfig's fields.

    data_directory: has no default, since replicas on other machines need the same. replica_host: where
    replicas listen: an address of this machine, or node for each machine's own in the cluster. insecure:
    without keys, serve everybody who reaches Ray Serve's proxies, and not this machine alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_directory: Path
    model: str = "tiny"
    system: str | None = None
    replicas: int = Field(1, ge=1, le=1024)
    max_replicas: int | None = Field(None, ge=1, le=1024)
    replica_host: str = "127.0.0.1"
    api_key_file: Path | None = None
    insecure: bool = False
    max_sessions: int = Field(16, ge=1, le=10_000)
    connections_per_key: int = Field(16, ge=1, le=65_536)
    max_connections: int = Field(256, ge=1, le=65_536)
    memory_gb: float | None = Field(None, ge=0.001, le=10_000)
    host_memory_gb: float = Field(2.0, ge=0.001, le=10_000)
    disk_gb: float = Field(8.0, ge=0.001, le=1_000_000)
    allow_origin: Texts = ()
    allow_host: Texts = ()
    device: str | None = None
    dtype: DTypeName | None = None
    backend: Backend | None = None
    lora: Texts = ()
    runtime: str = "{}"
    log_json: bool = False


def app_options(arguments: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> AppOptions:
    """The options of the environment, and in their place those of the arguments.

    Raises ValueError for a name that is none of them, and for a value that is not allowed; it says which.
    """
    named = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    try:
        return AppOptions.model_validate({**named, **arguments})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        there = (
            f"; there are {', '.join(AppOptions.model_fields)}" if name not in AppOptions.model_fields else ""
        )
        raise ValueError(f"{name} (or {PREFIX}{name.upper()}): {first['msg']}{there}") from None


def app(arguments: Mapping[str, Any]) -> Application:
    """Build the application. Raises ValueError as app_options does, and for more replicas than the cluster
    has GPUs or cores; RuntimeError where Ray or the data directory cannot be used."""
    from rfengine.serving.replicas.local import require_ray

    require_ray()
    from rfengine.serving.replicas.deployment import gateway_application
    from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan, threads_of_each

    options = app_options(arguments)
    gpus, cores = _there(options)
    device = options.device or ("cuda" if gpus else "cpu")
    most = options.max_replicas or options.replicas
    threads = threads_of_each(device, options.replicas, most, gpus, cores)
    source = ModelSource(
        options.model, device, options.dtype, options.system, options.backend,
        from_dict(RuntimeConfig, json.loads(options.runtime), "runtime"),
        tuple(map(Lora.parse, options.lora)),
    )  # fmt: skip
    file, directory = options.api_key_file, options.data_directory.expanduser().resolve()
    keys = ApiKeys.from_file(file) if file else ApiKeys.from_environment()
    plan = ReplicaPlan(
        source,
        server_options(options, directory, keys),
        options.replicas,
        most,
        threads,
        options.replica_host,
        options.log_json,
        options.insecure,
    )
    return gateway_application(plan)


def _there(options: AppOptions) -> tuple[int, int]:
    """GPUs and cores: of the cluster, where this process has joined one, else of this machine. Of machines
    that are not known yet Ray says which are there, and lets replicas wait."""
    import ray

    if ray.is_initialized():
        resources = ray.cluster_resources()
        return int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    least = (options.max_replicas or options.replicas) if options.replica_host == NODE else 0
    gpus = torch.cuda.device_count() if options.device is None else max(torch.cuda.device_count(), least)
    return gpus, max(len(os.sched_getaffinity(0)), least)
