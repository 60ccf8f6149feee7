"""The metrics of a server as Prometheus reads them."""

from __future__ import annotations

import threading
from typing import get_args

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from rfengine.serving.metrics import END_REASONS, JOB_STATUSES, MEMORY_KINDS, SESSION_STATES, ServerMetrics
from rfengine.serving.realtime.protocol import EndReason

LABELS = {"stage", "state", "outcome", "reason", "status", "kind", "route", "status_class"}


def samples(metrics: ServerMetrics) -> list[Sample]:
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    return [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    (found,) = [s.value for s in samples(metrics) if s.name == f"rfengine_{name}" and s.labels == labels]
    return found


def test_labels_name_no_session_prompt_or_key() -> None:
    metrics = ServerMetrics()
    metrics.count_request("/v1/videos/{video_id}", 200)
    metrics.first_frame_seconds.observe(0.5)
    assert {label for sample in samples(metrics) for label in sample.labels} == LABELS | {"le"}


def test_every_value_of_a_label_is_reported_from_the_start_and_no_other_is_taken() -> None:
    metrics = ServerMetrics()
    for state in SESSION_STATES:
        assert value(metrics, "sessions", state=state) == 0
    for reason in END_REASONS:
        assert value(metrics, "session_ends_total", reason=reason) == 0
    for status in JOB_STATUSES:
        assert value(metrics, "jobs", status=status) == 0
    for kind in MEMORY_KINDS:
        assert value(metrics, "memory_bytes", kind=kind) == 0
    count = len(samples(metrics))
    for labelled in (metrics.chunk_seconds, metrics.sessions, metrics.admissions, metrics.session_ends):
        with pytest.raises(KeyError):
            _ = labelled["session-1"]
    assert len(samples(metrics)) == count


def test_every_reason_of_the_protocol_can_end_a_session() -> None:
    assert set(get_args(EndReason)) == set(ServerMetrics().session_ends)


@pytest.mark.parametrize("name", ["first_frame_seconds", "prompt_latency_seconds"])
def test_histogram_reaches_from_a_millisecond_to_a_minute(name: str) -> None:
    metrics = ServerMetrics()
    for seconds in (0.0009, 0.3, 59.0, 61.0):
        getattr(metrics, name).observe(seconds)
    buckets = {s.labels["le"]: s.value for s in samples(metrics) if s.name == f"rfengine_{name}_bucket"}
    assert (buckets["0.001"], buckets["0.5"], buckets["60.0"], buckets["+Inf"]) == (1, 2, 3, 4)


def test_chunk_times_are_kept_apart_by_stage() -> None:
    metrics = ServerMetrics()
    for seconds, stage in enumerate(("denoise", "decode", "encode", "total"), 1):
        metrics.chunk_seconds[stage].observe(seconds)
        assert value(metrics, "chunk_seconds_sum", stage=stage) == seconds


def test_counters_count_and_gauges_are_set_or_ask() -> None:
    metrics = ServerMetrics()
    metrics.admissions["refused"].inc()
    metrics.session_ends["idle"].inc()
    metrics.dropped_chunks.inc(3)
    metrics.queue_chunks.set(4)
    metrics.queue_bytes.set_function(lambda: 5)
    metrics.sessions["paused"].set(2)
    metrics.jobs["failed"].set(6)
    metrics.memory_bytes["budget"].set(7)
    assert value(metrics, "admissions_total", outcome="refused") == 1
    assert value(metrics, "admissions_total", outcome="admitted") == 0
    assert value(metrics, "session_ends_total", reason="idle") == 1
    assert value(metrics, "dropped_chunks_total") == 3
    assert value(metrics, "queue_chunks") == 4
    assert value(metrics, "queue_bytes") == 5
    assert value(metrics, "sessions", state="paused") == 2
    assert value(metrics, "jobs", status="failed") == 6
    assert value(metrics, "memory_bytes", kind="budget") == 7


def test_requests_are_counted_by_template_and_class_of_status() -> None:
    metrics = ServerMetrics()
    for status in (200, 202, 404):
        metrics.count_request("/v1/videos/{video_id}", status)
    metrics.count_request(None, 404)
    route = "/v1/videos/{video_id}"
    assert value(metrics, "http_requests_total", route=route, status_class="2xx") == 2
    assert value(metrics, "http_requests_total", route=route, status_class="4xx") == 1
    assert value(metrics, "http_requests_total", route="unmatched", status_class="4xx") == 1


def test_servers_of_one_process_share_no_metric() -> None:
    before = {metric.name for metric in REGISTRY.collect()}
    first, second = ServerMetrics(), ServerMetrics()
    first.dropped_chunks.inc()
    assert value(second, "dropped_chunks_total") == 0
    assert {metric.name for metric in REGISTRY.collect()} == before


def test_metrics_of_several_threads_are_all_counted() -> None:
    metrics = ServerMetrics()

    def count() -> None:
        for _ in range(200):
            metrics.dropped_chunks.inc()
            metrics.count_request("/", 200)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "dropped_chunks_total") == 800
    assert value(metrics, "http_requests_total", route="/", status_class="2xx") == 800
