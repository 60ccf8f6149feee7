"""ReplicaPlan: what every replica runs and how many there are, checked before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rfengine import Lora
from rfengine.config import Backend, DTypeName, RuntimeConfig
from rfengine.pipeline import Pipeline
from rfengine.serving.admission import memory_for_sessions
from rfengine.serving.jobs.table import Journal
from rfengine.serving.server import ServerOptions

NODE = "node"  # as `host`: each machine's own address in the cluster


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What every replica loads: the arguments of Pipeline.from_pretrained. device: cpu or cuda."""

    model: str
    device: str
    dtype: DTypeName | None = None
    system: str | None = None
    backend: Backend | None = None
    runtime: RuntimeConfig = RuntimeConfig()
    loras: tuple[Lora, ...] = ()

    def load(self) -> Pipeline:
        """The pipeline. Raises as Pipeline.from_pretrained does."""
        return Pipeline.from_pretrained(
            self.model,
            self.device,
            self.dtype,
            system=self.system,
            backend=self.backend,
            runtime=self.runtime,
            loras=self.loras,
        )


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Replicas of one model.

    server: as of a single server; the limits of
    sessions are each replica's own, those of files are of all together. replicas: at the start and at least.
    most_replicas: where more are started while work waits. cpu_threads: of one replica on a CPU.
    host: where the gateway reaches replicas: an address, or NODE. insecure: without keys, behind the proxies
    of Ray Serve, clients of other machines are served too. lease_s: a replica that is silent for so
    long is lost; job_lease_s: so long after its last word another makes its jobs. more_after_s: one more
    starts when work has waited so long; fewer_after_s: one ends when most were idle for so long.
    """

    source: ModelSource
    server: ServerOptions
    replicas: int
    most_replicas: int
    cpu_threads: int
    host: str = "127.0.0.1"
    log_json: bool = False
    insecure: bool = False
    lease_s: float = 5.0
    job_lease_s: float = 15.0
    more_after_s: float = 30.0
    fewer_after_s: float = 600.0

    @property
    def between_machines(self) -> bool:
        """Whether replicas may be on several machines."""
        return self.host == NODE

    @property
    def journal(self) -> Journal:
        """Of the databases in the data directory."""
        return "DELETE" if self.between_machines else "WAL"

    @property
    def resources(self) -> dict[str, float]:
        """What a replica has for itself, as Ray counts it."""
        if self.source.device == "cpu":
            return {"num_cpus": self.cpu_threads}
        return {"num_gpus": 1, "num_cpus": 1}

    def own_options(self, pipeline: Pipeline) -> ServerOptions:
        """The options of one replica: its part of what all share. On a CPU that is the memory, too."""
        service, on_cpu = self.server.service, self.source.device == "cpu"
        memory = service.memory_bytes
        if memory is None and on_cpu:
            memory = memory_for_sessions(pipeline.model.device) // self.most_replicas
        threads = self.cpu_threads if on_cpu else None
        return replace(
            self.server,
            keys=None,
            service=replace(service, memory_bytes=memory, cpu_threads=threads),
            recording_bytes=self.server.recording_bytes // self.most_replicas,
        )


def threads_of_each(device: str, replicas: int, most_replicas: int, gpus: int, cores: int) -> int:
    """Cores of one replica on a CPU, and 1 beside a GPU.

    Raises ValueError for more replicas than there are GPUs or cores, and for most_replicas below replicas.
    """
    if most_replicas < replicas:
        raise ValueError(
            f"max-replicas is {most_replicas} and replicas {replicas}; give at least as many, or leave it out"
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f"the device of replicas is {device}; use cuda, of which each has one, or cpu")
    there, kind = (cores, "cores") if device == "cpu" else (gpus, "GPUs")
    if most_replicas > there:
        raise ValueError(
            f"{most_replicas} replicas need as many {kind} and there are {there}; give at most {there}"
        )
    return cores // most_replicas if device == "cpu" else 1
