"""Replicas of the shipped model in a real Ray on this machine, and their gateway in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from rfengine.serving.options import ServiceOptions
from rfengine.serving.replicas.shared_directory import SharedDirectory
from rfengine.serving.replicas.table import Replica, ReplicaTable
from rfengine.serving.server import ServerOptions
from support.forking_process import ROOT
from support.servers import RunningServer, running_app

if TYPE_CHECKING:
    from ray.serve import Application

    from rfengine.serving.replicas.plan import ReplicaPlan

LIMIT_S = 90.0
MEMORY = 2**28


def replica_plan(directory: Path) -> ReplicaPlan:
    """Two replicas of one core each, whose leases end soon."""
    from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan

    service = ServiceOptions(memory_bytes=MEMORY)
    server = ServerOptions(directory, service=service, drain_s=10.0)
    return ReplicaPlan(ModelSource("tiny", "cpu"), server, 2, 2, 1, lease_s=2.0, job_lease_s=3.0)


def application(arguments: Mapping[str, Any]) -> Application:
    """What Ray Serve builds; a changed number of replicas leaves the others alone."""
    from rfengine.serving.replicas.deployment import replicas_application

    plan = replica_plan(Path(arguments["directory"]))
    if arguments.get("by_queue"):
        plan = replace(plan, replicas=1, more_after_s=1.0, fewer_after_s=3.0)
    return replicas_application(plan)


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + LIMIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {LIMIT_S:g} s: {what}"
        time.sleep(0.05)
    return value


class RayReplicas:
    """The replicas and the gateway, `server`."""

    def __init__(self, server: RunningServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.table = ReplicaTable(SharedDirectory(directory).table_path)

    def scale(self, count: int | None) -> None:
        """Let there be so many replicas, in a while; None lets the queue decide between one and two."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = {
            "name": "rfengine",
            "route_prefix": None,
            "import_path": "support.ray_replicas:application",
            "args": {"directory": str(self.directory), "by_queue": count is None},
            "deployments": [] if count is None else [{"name": "replicas", "num_replicas": count}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}))

    def ready(self) -> dict[str, Replica]:
        """Those that take sessions."""
        every = self.table.replicas().values()
        return {each.name: each for each in every if not each.is_gone and each.load.state == "ready"}

    def await_ready(self, count: int) -> dict[str, Replica]:
        """So many, known to the gateway too."""
        until(lambda: len(self.ready()) == count, f"{count} replicas are ready")

        def known() -> bool:
            counts = httpx2.get(f"{self.server.url}/readyz").json()["replicas"]
            return counts["ready"] == count

        until(known, "the gateway knows them")
        return self.ready()

    def kill(self, name: str) -> None:
        """End a replica at once; it gets no signal that it could see."""
        os.kill(self.table.replicas()[name].process, signal.SIGKILL)


@contextmanager
def ray_replicas(directory: Path, count: int = 2) -> Iterator[RayReplicas]:
    """Run them during the block."""
    from rfengine.serving.replicas.gateway import create_gateway
    from rfengine.serving.replicas.local import local_ray

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with (
            local_ray(2, 0, log_to_driver=False),
            running_app(create_gateway(replica_plan(directory).server)) as server,
        ):
            replicas = RayReplicas(server, directory)
            replicas.scale(count)
            yield replicas
            replicas.table.close()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
