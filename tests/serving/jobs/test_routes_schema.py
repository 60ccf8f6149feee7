"""Requests of every kind that the schema of the video job API allows, and of kinds that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rfengine import Pipeline
from rfengine.serving.jobs.requests import JobLimits
from support.models import small_pipeline
from support.sessions import WAIT
from support.video_api_app import video_server

pytest.importorskip("python_multipart", reason="forms are read with python-multipart")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


def test_schema_holds_for_a_few_requests_of_every_kind(pipeline: Pipeline, tmp_path: Path) -> None:
    check_schema(pipeline, tmp_path, examples=6)


@pytest.mark.soak
def test_schema_holds_for_many_requests_of_every_kind(pipeline: Pipeline, tmp_path: Path) -> None:
    check_schema(pipeline, tmp_path, examples=500)


def check_schema(pipeline: Pipeline, directory: Path, examples: int) -> None:
    """Requests that are drawn from the schema, right and wrong ones, get the answers that it describes."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schemathesis.checks.load_all_checks()
    checks = schemathesis.checks.CHECKS.get_by_names(
        [
            "not_a_server_error", "status_code_conformance", "content_type_conformance",
            "response_schema_conformance",
        ]
    )  # fmt: skip
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    limits = JobLimits(max_frames=20, max_waiting=5)
    with video_server(pipeline, directory / "jobs", limits) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == 7
        for operation in operations:
            for mode in modes if operation.body or operation.query else modes[:1]:

                @hypothesis.given(operation.as_strategy(mode))
                @hypothesis.settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    derandomize=examples < 50,
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                def check(case: Any) -> None:
                    case.call_and_validate(checks=checks, timeout=WAIT)

                check()
