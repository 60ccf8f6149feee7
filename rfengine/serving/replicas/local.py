"""A gateway in this process, and its replicas in a Ray of its own on this machine."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rfengine.serving.process import DrainingServer, await_end_of, uvicorn_config
from rfengine.serving.replicas.deployment import replicas_application
from rfengine.serving.replicas.gateway import create_gateway
from rfengine.serving.replicas.plan import ReplicaPlan

logger = logging.getLogger(__name__)

APPLICATION = "rfengine"
_STORE_BYTES = 100 * 2**20  # of Ray's shared memory, through which nothing large goes here
_MOST_TEMPORARY = 30  # characters: the paths of Ray's sockets below it have to fit into 107
_POLL_S = 0.05
_LAST_OF_TRACEBACK = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)$", re.MULTILINE)
# Ray listens on loopback alone, as it does on other systems, and never starts again by itself; no statistics
# are sent, and each line of a replica's log is shown, without colours
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SCHEDULER_EVENTS": "0",
}


def require_ray() -> None:
    """Raises RuntimeError where Ray Serve is not installed."""
    for name in ("ray", "aiohttp"):
        if find_spec(name) is None:
            raise RuntimeError(f"replicas need {name}, which is not installed; pip install 'rfengine[ray]'")


@contextmanager
def local_ray(cores: int, gpus: int, log_to_driver: bool = True) -> Iterator[None]:
    """Run Ray on this machine during the block, reached by this user from this machine alone, and leave
    nothing of it."""
    os.environ.update(_ENVIRONMENT)
    os.environ.pop("RAY_AUTH_MODE", None)  # a Ray of its own asks for a token unless that says otherwise
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    require_ray()
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    temporary = tempfile.gettempdir()
    directory = tempfile.mkdtemp("", "rf", temporary if len(temporary) <= _MOST_TEMPORARY else "/tmp")
    try:
        ray.init(
            "local",
            num_cpus=cores,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=log_to_driver,
            logging_level=logging.WARNING,
            _temp_dir=directory,
        )
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


class ReplicatedServer:
    """A gateway that listens on a socket, with its replicas.

    Raises RuntimeError where another server has the data directory, or it cannot be used.
    """

    def __init__(self, plan: ReplicaPlan, listener: socket.socket) -> None:
        os.environ.update(_ENVIRONMENT)  # before Ray is imported, which reads it then
        self._listener = listener
        self._app = create_gateway(plan.server)
        self._replicas = replicas_application(plan)
        self._error: Exception | None = None
        self._reason = ""  # for it
        self.server = DrainingServer(uvicorn_config(self._app, plan.server), self._drain)

    def run(self) -> int:
        """Serve until a signal to stop, inside of `local_ray`; returns the exit status.

        Raises RuntimeError where the replicas cannot be started.
        """
        threading.Thread(target=self._deploy, name="rfengine-deploy", daemon=True).start()
        self.server.run(sockets=[self._listener])
        if self._error is not None:
            raise RuntimeError(f"the replicas did not start: {self._reason}") from self._error
        return 0 if self.server.started else 1

    def _deploy(self) -> None:
        """Once the gateway has the data directory."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        while not self.server.started:
            if self.server.should_exit:
                return
            time.sleep(_POLL_S)
        try:
            serve.run(self._replicas, name=APPLICATION, route_prefix=None)
        except (RuntimeError, RayError, RayServeException) as error:
            if not self._app.state.gateway.draining:
                self._error, self._reason = error, _reason(error)
                self.server.should_exit = True

    def _drain(self) -> None:
        """Let every replica end its sessions, and the clients hear of it."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        gateway = self._app.state.gateway
        gateway.draining = True
        logger.info("stopping: sessions end after their chunk")
        try:
            serve.delete(APPLICATION)
        except (RuntimeError, TimeoutError, AttributeError, RayError, RayServeException) as error:
            # a second signal has ended Ray, whose objects then lack what they ask of each other
            logger.warning("the replicas are cut off: %s", type(error).__name__)
        finally:
            await_end_of(gateway.relay.connections)


def _reason(error: Exception) -> str:
    """A replica's own error, at the end of the traceback in what Ray Serve says of it."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    messages = [] if application is None else [each.message for each in application.deployments.values()]
    found = _LAST_OF_TRACEBACK.findall("\n".join(messages))
    return found[-1] if found else str(error)
