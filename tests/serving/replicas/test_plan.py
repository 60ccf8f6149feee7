"""What is refused before a replica is started, and what each has of what all share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfengine.serving.options import ServiceOptions
from rfengine.serving.replicas.plan import ModelSource, ReplicaPlan, threads_of_each
from rfengine.serving.server import ServerOptions
from support.models import small_pipeline


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cpu", 3, 3, 0, 2), "3 replicas need as many cores and there are 2; give at most 2"),
        (("cuda", 2, 9, 8, 96), "9 replicas need as many GPUs and there are 8; give at most 8"),
        (("cpu", 3, 2, 0, 8), "max-replicas is 2 and replicas 3; give at least as many"),
        (
            ("cuda:1", 2, 2, 8, 96),
            "the device of replicas is cuda:1; use cuda, of which each has one, or cpu",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        threads_of_each(*given)


def test_cores_are_divided_and_a_gpu_is_one_replicas() -> None:
    assert threads_of_each("cpu", 2, 3, 0, 8) == 2
    assert threads_of_each("cuda", 2, 8, 8, 96) == 1
    source = ModelSource("tiny", "cpu")
    plan = ReplicaPlan(source, ServerOptions(Path("/data")), 2, 3, 2)
    assert plan.resources == {"num_cpus": 2}
    on_gpu = ReplicaPlan(ModelSource("tiny", "cuda"), ServerOptions(Path("/data")), 2, 2, 1)
    assert on_gpu.resources == {"num_gpus": 1, "num_cpus": 1}


def test_each_replica_has_its_part_of_the_disk_and_of_the_memory_of_the_host() -> None:
    pipeline = small_pipeline()
    server = ServerOptions(Path("/data"), recording_bytes=900)
    plans = [ReplicaPlan(ModelSource("tiny", "cpu"), server, 1, most, 1) for most in (1, 3)]
    alone, third = (plan.own_options(pipeline) for plan in plans)
    assert (alone.recording_bytes, third.recording_bytes) == (900, 300)
    assert third.service.memory_bytes < alone.service.memory_bytes / 2.5
    assert third.video_bytes == alone.video_bytes  # jobs are counted in one table
    given = ServerOptions(Path("/data"), service=ServiceOptions(memory_bytes=77))
    assert ReplicaPlan(ModelSource("tiny", "cpu"), given, 1, 3, 2).own_options(
        pipeline
    ).service == ServiceOptions(memory_bytes=77, cpu_threads=2)
