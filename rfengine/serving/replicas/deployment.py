"""The replicas and their gateway as an application of Ray Serve.

Ray Serve places, watches, replaces and counts the replicas; what clients send does not pass through it, but
from the gateway straight to the port of a replica.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI

from rfengine.serving.json_logs import configure_logging, configure_service_logging
from rfengine.serving.process import end_process
from rfengine.serving.replicas.gateway import create_gateway
from rfengine.serving.replicas.local_clients import LocalClients
from rfengine.serving.replicas.member import Member
from rfengine.serving.replicas.plan import ReplicaPlan
from rfengine.serving.replicas.scaling import (
    LOOK_BACK_S,
    REFUSED_S,
    WAITING,
    WORKING,
    policy,
)
from rfengine.serving.replicas.shared_directory import SharedDirectory

if TYPE_CHECKING:
    from ray.serve import Application

REPLICAS, GATEWAY = "replicas", "gateway"  # names of the deployments

_STOP_S = 15.0  # beyond draining: the last words to clients, and the engine's end
_HEALTH_S = 2.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class EngineReplica:
    """One replica, as Ray Serve runs it."""

    def __init__(self, plan: ReplicaPlan, token: str) -> None:
        self._member: Member | None = None
        configure_service_logging(plan.log_json)
        torch.set_num_threads(1)  # the engine's thread alone has more, as in a single server
        pipeline = plan.source.load()
        self._member = Member(pipeline, plan, _own_host(plan), token, end_process)

    def check_health(self) -> None:
        """Raises RuntimeError where the replica has to be replaced."""
        self._member.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `policy` decides by."""
        jobs = self._member.app.state.store.counts()
        working = self._member.app.state.service.counts()
        refused = self._member.table.refusals(REFUSED_S)
        return {WAITING: jobs["queued"] + refused, WORKING: sum(working.values())}

    def __del__(self) -> None:
        """What Ray Serve calls when it stops a replica."""
        if self._member is not None:
            self._member.stop()


def _own_host(plan: ReplicaPlan) -> str:
    if not plan.between_machines:
        return plan.host
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def replicas_application(plan: ReplicaPlan) -> Application:
    """The replicas alone, for a gateway in another process. Raises RuntimeError where the data directory
    cannot be used."""
    from ray import serve

    count: dict[str, Any] = {"num_replicas": plan.replicas}
    if plan.most_replicas > plan.replicas:
        count = {"autoscaling_config": _autoscaling(plan)}
    deployment = serve.deployment(
        EngineReplica,
        name=REPLICAS,
        ray_actor_options=plan.resources,
        graceful_shutdown_timeout_s=plan.server.drain_s + _STOP_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=_HEALTH_S,
        logging_config=_QUIET,
        **count,
    )
    token = SharedDirectory(plan.server.data_directory).token
    own = replace(plan, server=replace(plan.server, keys=None))  # replicas see no key, nor what it is told by
    return deployment.bind(own, token)


def _autoscaling(plan: ReplicaPlan) -> dict[str, Any]:
    return {
        "min_replicas": plan.replicas,
        "max_replicas": plan.most_replicas,
        "initial_replicas": plan.replicas,
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": plan.more_after_s,
        "downscale_delay_s": plan.fewer_after_s,
        "policy": {"policy_function": policy},
    }


def gateway_behind_proxies(plan: ReplicaPlan) -> FastAPI:
    """The gateway. Without keys it serves this machine alone, unless the plan is insecure: it does not choose
    where the proxies of Ray Serve listen."""
    gateway = create_gateway(plan.server, plan.journal)
    if plan.server.keys is None and not plan.insecure:
        gateway.add_middleware(LocalClients)
    return gateway


def gateway_application(plan: ReplicaPlan) -> Application:
    """The gateway, which Ray Serve's own proxies pass requests to, with its replicas."""
    from ray import serve

    server = plan.server

    def build() -> FastAPI:
        configure_logging("INFO", plan.log_json)
        return gateway_behind_proxies(plan)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name=GATEWAY,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=server.max_connections,
        graceful_shutdown_timeout_s=server.drain_s + _STOP_S,
        logging_config=_QUIET,
    )
    return deployment.bind(replicas_application(plan))
