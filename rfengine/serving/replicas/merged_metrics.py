"""The numbers of all replicas in one text of Prometheus, each with its replica as a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from rfengine.serving.replicas.table import Condition

_SHARED = "rfengine_jobs"  # which every replica counts in the same table
_CREATED = "_created"  # times of Prometheus's own, families of their own in the text
STATES: tuple[Condition, ...] = get_args(Condition)


@dataclass(frozen=True, slots=True)
class _Route:
    path: str


RELAYED = _Route("relayed")  # as the route of a request that a replica answers, which counts it by its own


class RequestCounts:
    """The requests of a gateway, as ServerMetrics counts those of a server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names = ("route", "status_class")
        self._requests = Counter(
            "rfengine_http_requests", "HTTP requests answered.", names, registry=self._registry
        )

    def count_request(self, route: str | None, status: int) -> None:
        """Count an answered request; route: None where none matched."""
        self._requests.labels(route or "unmatched", f"{status // 100}xx").inc()

    def text(self) -> str:
        """In Prometheus's format."""
        return generate_latest(self._registry).decode()


def merged(texts: Mapping[str, str], states: Mapping[str, int], requests: RequestCounts) -> bytes:
    """texts: what each replica answers to GET /metrics, by its name. states: how many replicas are in each
    of STATES. requests: the gateway's, which has its own name as a replica."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged({**texts, "gateway": requests.text()}, states))
    return generate_latest(registry)


class _Merged:
    def __init__(self, texts: Mapping[str, str], states: Mapping[str, int]) -> None:
        self._texts, self._states = texts, states

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        replicas = GaugeMetricFamily("rfengine_replicas", "Replicas by state.", labels=["state"])
        for state in STATES:
            replicas.add_metric([state], self._states.get(state, 0))
        yield replicas
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                if family.name.endswith(_CREATED):
                    continue
                first = family.name not in families
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                if family.name == _SHARED:
                    kept.samples += family.samples if first else ()
                else:
                    kept.samples += [_labelled(sample, replica) for sample in family.samples]
        yield from families.values()


def _labelled(sample: Sample, replica: str) -> Sample:
    return sample._replace(labels={**sample.labels, "replica": replica})
