"""A TensorRT that runs engines with onnxruntime on the CPU, and holds its callers to TensorRT's rules.

It has the names that the engine uses and no other. Tensors are read and written through the addresses that a
context was given, so a wrong name, shape, type or order shows as a failed assertion or as wrong pixels. An
engine is the ONNX file behind the version that built it.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch

STREAM = 77  # the handle of the stream that is current in the tests
ACTIVATION_BYTES = 1000
_MAGIC = b"fake engine "
_TIMINGS = b"fake timings of "


class DataType(enum.Enum):
    FLOAT, HALF, BF16 = 0, 1, 7


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class FlagsOf10(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1


class FlagsOf11(enum.IntEnum):
    STRONGLY_TYPED = 0


class Logger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True


TYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, numpy.float32),
    onnx.TensorProto.FLOAT16: (DataType.HALF, numpy.float16),
}


@dataclass
class Journal:
    """What the module was asked for, and the faults it has."""

    executions: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    timings_given: list[bytes] = field(default_factory=list)
    recorded: list[Callable[[], None]] | None = None  # a list while a graph is captured
    parser_error: str = ""
    build_fails: bool = False
    rename: str = ""


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> memoryview:
        return memoryview(self.content + b"+1")


class BuilderConfig:
    def __init__(self, journal: Journal, version: str) -> None:
        self.journal, self.mark = journal, _TIMINGS + version.encode()
        self.workspace, self.cache = 0, None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE and isinstance(pool_size, int)
        self.workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        assert isinstance(serialized_timing_cache, bytes)
        self.journal.timings_given.append(serialized_timing_cache)
        return TimingCache(serialized_timing_cache or self.mark)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, TimingCache) and ignore_mismatch is False
        self.cache = cache
        return cache.content.startswith(self.mark)


class Network:
    def __init__(self, journal: Journal) -> None:
        self.journal, self.content = journal, b""

    def load(self, content: bytes) -> None:
        self.content, graph = content, onnx.load_from_string(content).graph
        self.inputs, self.outputs = (
            [entry.name for entry in graph.input],
            [entry.name for entry in graph.output],
        )
        if self.journal.rename:
            self.outputs[0] = self.journal.rename

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.inputs[index])

    def get_output(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.outputs[index])


class OnnxParser:
    def __init__(self, network: Network, logger: Logger) -> None:
        assert isinstance(network, Network) and logger.ready
        self.network = network

    def parse_from_file(self, model: str) -> bool:
        assert isinstance(model, str)  # a Path is refused by the bindings
        with open(model, "rb") as file:
            self.network.load(file.read())
        return not self.network.journal.parser_error

    @property
    def num_errors(self) -> int:
        return 1 if self.network.journal.parser_error else 0

    def get_error(self, index: int) -> SimpleNamespace:
        assert index == 0
        return SimpleNamespace(desc=lambda: self.network.journal.parser_error)


class ExecutionContext:
    def __init__(self, engine: CudaEngine) -> None:
        self.engine, self.addresses, self.memory = engine, {}, 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        self.addresses[name] = memory
        return name in self.engine.tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM and self.memory and self.addresses.keys() == self.engine.tensors.keys()
        places = dict(self.addresses)
        assert len(set(places.values())) == len(places)  # nothing is written over what is read
        if self.engine.journal.recorded is None:
            self._run(places)
        else:
            self.engine.journal.recorded.append(lambda: self._run(places))
        return True

    def _run(self, places: dict[str, int]) -> None:
        tensors = {name: self._tensor(name, address) for name, address in places.items()}
        inputs = {name: tensor for name, tensor in tensors.items() if self.engine.tensors[name][0] == "input"}
        outputs = [name for name in tensors if name not in inputs]
        for name, value in zip(outputs, self.engine.session.run(outputs, inputs), strict=True):
            tensors[name][:] = value
        self.engine.journal.executions.append((self.engine.stage, places))

    def _tensor(self, name: str, address: int) -> numpy.ndarray:
        _, shape, (_, dtype) = self.engine.tensors[name]
        size = int(numpy.prod(shape)) * numpy.dtype(dtype).itemsize
        return numpy.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


class CudaEngine:
    device_memory_size_v2 = ACTIVATION_BYTES

    def __init__(self, journal: Journal, content: bytes) -> None:
        model = onnx.load_from_string(content)
        self.journal = journal
        self.stage = next(entry.value for entry in model.metadata_props if entry.key == "rfengine.stage")
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.tensors: dict[str, tuple[str, tuple[int, ...], tuple[DataType, Any]]] = {}
        for mode, entries in (("input", model.graph.input), ("output", model.graph.output)):
            for entry in entries:
                kind = entry.type.tensor_type
                shape = tuple(axis.dim_value for axis in kind.shape.dim)
                self.tensors[entry.name] = (mode, shape, TYPES[kind.elem_type])

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.tensors[name][0].upper()]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name][1])

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name][2][0]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> ExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return ExecutionContext(self)


def fake_tensorrt(version: str) -> ModuleType:
    """The module `tensorrt` of one version; its `journal` tells what was done with it."""
    major = int(version.split(".")[0])
    flags = FlagsOf10 if major == 10 else FlagsOf11
    wanted_flags = 1 << FlagsOf10.STRONGLY_TYPED if major == 10 else 0
    journal = Journal()

    class Builder:
        def __init__(self, logger: Logger) -> None:
            assert logger.ready
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            assert flags == wanted_flags
            return Network(journal)

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig(journal, version)

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> memoryview | None:
            assert config.cache is not None and config.workspace > 2**30
            if journal.build_fails:
                self.logger.log(Logger.Severity.ERROR, "no tactic fits the memory")
                return None
            return memoryview(_MAGIC + version.encode() + b"\n" + network.content)

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            assert logger.ready
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
            head, _, content = serialized_engine.partition(b"\n")
            if head != _MAGIC + version.encode():
                self.logger.log(Logger.Severity.ERROR, "the version tag does not match")
                return None
            return CudaEngine(journal, content)

    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # transformers looks for it when it is imported
    names = dict(
        __version__=version, ILogger=Logger, MemoryPoolType=MemoryPoolType, TensorIOMode=TensorIOMode,
        NetworkDefinitionCreationFlag=flags, DataType=DataType, OnnxParser=OnnxParser, Builder=Builder,
        Runtime=Runtime, ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        journal=journal,
    )  # fmt: skip
    for name, value in names.items():
        setattr(module, name, value)
    return module


def install(monkeypatch: pytest.MonkeyPatch, version: str, gpu: str = "Fake GPU 80GB") -> Journal:
    """Put the fake in the place of tensorrt, and on the CPU what the engine asks of torch.cuda."""
    module = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "device", _Device)
    return module.journal


class _Device:
    def __init__(self, device: torch.device | int) -> None:
        assert isinstance(device, torch.device) or device == -1  # which changes nothing

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class RecordedCall:
    """CapturedCall on a CPU: warms up, records what reaches TensorRT with its addresses, replays that."""

    made = 0

    def __init__(
        self, function: Callable[[], None], restore: Callable[[], None], device: torch.device
    ) -> None:
        import tensorrt

        self.journal = tensorrt.journal
        type(self).made += 1
        for _ in range(2):
            function()
        restore()
        self.journal.recorded = self.work = []
        function()
        self.journal.recorded = None

    def replay(self) -> None:
        for call in self.work:
            call()
