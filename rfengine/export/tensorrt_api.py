"""The part of TensorRT's Python package that the engine uses, as protocols, and the package on request.

Names and signatures are those of its bindings 10.1 to 11.4; a test holds the protocols against the package
where it is installed. TensorRT 11 has strongly typed networks only; 10 is asked for one.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch

logger = logging.getLogger(__name__)

HOW_TO_GET = (
    "pip install tensorrt, with NVIDIA's package index as --extra-index-url where its libraries "
    "(tensorrt_cu13_libs) are not found"
)
_OLDEST = (10, 1)  # the first with memory for activations that the caller gives and measures
_TYPED_ALWAYS = 11  # from here on every network is strongly typed
_RELEASE = re.compile(r"(\d+)\.(\d+)")


class HostMemory(Protocol):
    """Bytes that TensorRT owns: a serialized engine or timing cache. bytes(...) copies them."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class NetworkTensor(Protocol):
    @property
    def name(self) -> str: ...


class Network(Protocol):
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    def get_input(self, index: int) -> NetworkTensor: ...
    def get_output(self, index: int) -> NetworkTensor: ...


class TimingCache(Protocol):
    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...


class OnnxParser(Protocol):
    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class ExecutionContext(Protocol):
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    @property
    def num_io_tensors(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Iterable[int]: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def create_execution_context(self, strategy: Any) -> ExecutionContext | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class TensorRT(Protocol):
    """The module `tensorrt`: classes, and enumerations whose members are only compared and passed on."""

    __version__: str
    ILogger: Any
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    TensorIOMode: Any
    DataType: Any
    ExecutionContextAllocationStrategy: Any

    def Builder(self, logger: Any) -> Builder: ...  # noqa: N802 (TensorRT's own name)
    def OnnxParser(self, network: Network, logger: Any) -> OnnxParser: ...  # noqa: N802
    def Runtime(self, logger: Any) -> Runtime: ...  # noqa: N802


def import_tensorrt() -> TensorRT:
    """The package. Raises RuntimeError, with the way to get it, when it is missing, incomplete or too old."""
    try:
        trt = cast(TensorRT, importlib.import_module("tensorrt"))
    except ImportError as error:  # the bindings alone fail here, for want of their libraries
        raise RuntimeError(f"TensorRT cannot be imported ({error}); {HOW_TO_GET}") from error
    if release(trt) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeError(f"TensorRT is {trt.__version__} and {oldest} or later is needed; {HOW_TO_GET}")
    return trt


def release(trt: TensorRT) -> tuple[int, int]:
    """Major and minor version. Raises RuntimeError when the package does not tell."""
    found = _RELEASE.match(trt.__version__)
    if found is None:
        raise RuntimeError(f"TensorRT says it is version {trt.__version__!r}; {HOW_TO_GET}")
    return int(found[1]), int(found[2])


def network_flags(trt: TensorRT) -> int:
    """Flags of a strongly typed network: the types of the ONNX file are the types of the engine."""
    if release(trt)[0] >= _TYPED_ALWAYS:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def torch_dtypes(trt: TensorRT) -> dict[Any, torch.dtype]:
    """torch's dtype for each data type that a binding may have."""
    kinds = trt.DataType
    return {kinds.FLOAT: torch.float32, kinds.HALF: torch.float16, kinds.BF16: torch.bfloat16}


def make_logger(trt: TensorRT) -> Any:
    """A trt.ILogger that hands messages to logging; its `errors` keep those that say why a call failed."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class ForwardingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings refuse super()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels[severity]
            if level == logging.ERROR:
                self.errors.append(msg)
            logger.log(min(level, logging.WARNING), "TensorRT: %s", msg)

        def reason(self) -> str:
            return self.errors[-1] if self.errors else "TensorRT gives no reason"

    return ForwardingLogger()
