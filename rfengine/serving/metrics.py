"""Numbers of a server in the text format of Prometheus; no label names a session, a prompt or a key."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from rfengine.serving.events import EndReason

STAGES = ("denoise", "decode", "encode", "total")
SESSION_STATES = ("running", "paused", "draining")
ADMISSIONS = ("admitted", "refused")
END_REASONS = get_args(EndReason)
JOB_STATUSES = ("queued", "in_progress", "completed", "failed")
MEMORY_KINDS = ("device", "host", "budget")

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)


class ServerMetrics:
    """The metrics of one server, in a registry of its own.

    What has a label is a dict over all its values, so each is reported from the start, as 0, and another
    value is a KeyError: `sessions["running"].set(2)`. A gauge is set, or asks a callback at each render
    (`queue_bytes.set_function`). Every call may come from any thread.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"rfengine_{name}_seconds", text, labels, buckets=_SECONDS, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"rfengine_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rfengine_{name}", text, labels, registry=registry)

        self.first_frame_seconds = seconds("first_frame", "From session.start to the first chunk sent.")
        chunk = seconds("chunk", "Time of a chunk by stage.", "stage")
        self.chunk_seconds = {stage: chunk.labels(stage) for stage in STAGES}
        self.prompt_latency_seconds = seconds(
            "prompt_latency", "From a prompt received to the first chunk made with it sent."
        )
        self.queue_bytes = gauge("queue_bytes", "Bytes that wait to be sent to clients.")
        self.queue_chunks = gauge("queue_chunks", "Chunks that wait to be sent to clients.")
        sessions = gauge("sessions", "Sessions by state.", "state")
        self.sessions = {state: sessions.labels(state) for state in SESSION_STATES}
        admissions = counter("admissions", "Sessions asked for, by outcome.", "outcome")
        self.admissions = {outcome: admissions.labels(outcome) for outcome in ADMISSIONS}
        self.dropped_chunks = counter("dropped_chunks", "Chunks left out since a client did not read.")
        ends = counter("session_ends", "Sessions that ended, by reason.", "reason")
        self.session_ends = {reason: ends.labels(reason) for reason in END_REASONS}
        jobs = gauge("jobs", "Video jobs by status.", "status")
        self.jobs = {status: jobs.labels(status) for status in JOB_STATUSES}
        memory = gauge("memory_bytes", "Memory in use, and the budget of admission.", "kind")
        self.memory_bytes = {kind: memory.labels(kind) for kind in MEMORY_KINDS}
        self._requests = counter("http_requests", "HTTP requests answered.", "route", "status_class")

    def count_request(self, route: str | None, status: int) -> None:
        """Count an answered request. route: the template, as /v1/videos/{video_id}, never the path that came;
        None where none matched."""
        self._requests.labels(route or "unmatched", f"{status // 100}xx").inc()

    def render(self) -> tuple[bytes, str]:
        """What GET /metrics answers, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
