"""How many replicas there should be, by the length of the queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

WAITING, WORKING = "rfengine_waiting", "rfengine_working"  # what each replica reports
LOOK_BACK_S = 10.0
REFUSED_S = 10.0  # in which a refused session counts as one that waits


def wanted_replicas(present: int, waiting: float, working: float) -> int:
    """present: replicas that run. waiting: queued jobs, and sessions that no replica had room for. working:
    sessions and jobs in progress, of all replicas.

    One more while anything waits; one less where fewer than the replicas work, so that a replica which is
    drained has one session at most, mostly none.
    """
    if waiting >= 1:
        return present + 1
    return present - 1 if working < present - 1 else present


def policy(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """What Ray Serve asks; it keeps to the bounds and the delays of its configuration itself."""
    reported: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    # every replica counts the queue that all share
    waiting = max(reported.get(WAITING, {}).values(), default=0.0)
    working = sum(reported.get(WORKING, {}).values())
    return wanted_replicas(context.target_num_replicas, waiting, working), {}
