"""The kernels of csrc/: finds the fatbin, loads it through PyCUDA or cuda.core, launches on torch's stream.

Both loaders work on the primary context of the device, the one torch uses, so pointers of tensors are valid
as they are, and a launch is captured by a CUDA graph like any other once its kernel has run before. Importing
this needs torch alone.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rfengine.ops.native.tensor_map import MAP_BYTES, TensorMap, driver_library

if TYPE_CHECKING:
    from numpy import generic

FATBIN = Path(__file__).parents[2] / "_native.fatbin"  # where CMakeLists.txt and setup.py put it
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY: torch writes the same stream as 0
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no ordering with the default stream, as torch's own side streams
_SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: 48 KB before it is set


class Driver(Protocol):
    """Launches the kernels of the fatbin on one device."""

    device: torch.device
    processors: int  # multiprocessors of the device

    def launch(
        self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic | TensorMap, ...],
        shared_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Queue a kernel on torch's current stream.

        arguments: tensor maps, then numpy scalars, each of the width that the kernel declares. shared_bytes:
        of dynamic shared memory, always the same for one kernel.
        """


def _count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class PyCudaDriver:
    """Loads through PyCUDA.

    PyCUDA launches on its default stream or on streams it made, never on a foreign one. A launch that torch
    has on a side stream therefore goes to a stream of PyCUDA's that waits for torch's and is waited for; a
    capture follows these events, so that in a graph they cost nothing.
    """

    # of the module in LOADERS, and of what is in it
    NEEDS = (
        "init", "Device.retain_primary_context", "Context", "Stream", "module_from_buffer",
        "function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES",
    )  # fmt: skip

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self.device = device
        self.processors = _count_processors(device)
        self._cuda = cuda
        self._context = cuda.Device(device.index).retain_primary_context()
        self._module = self._in_context(lambda: cuda.module_from_buffer(fatbin))
        self._functions: dict[str, Any] = {}
        self._streams: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def _in_context(self, action: Callable[[], Any]) -> Any:
        """Keep our context on PyCUDA's own stack, one for each thread, only for as long as `action` runs."""
        self._context.push()
        try:
            return action()
        finally:
            self._cuda.Context.pop()

    def _function(self, kernel: str, arguments: tuple[generic | TensorMap, ...], shared_bytes: int) -> Any:
        if kernel not in self._functions:
            function = self._module.get_function(kernel)
            if shared_bytes:
                most = self._cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(most, shared_bytes)
            kinds = [
                f"{MAP_BYTES}s" if isinstance(argument, TensorMap) else argument.dtype
                for argument in arguments
            ]
            self._functions[kernel] = function.prepare(kinds)
        return self._functions[kernel]

    def _beside(self, current: torch.cuda.Stream) -> tuple[Any, torch.cuda.Stream]:
        """PyCUDA's stream for one of torch's; shared by two, it would carry one capture into another."""
        handle = current.cuda_stream
        if handle not in self._streams:
            own = self._in_context(lambda: self._cuda.Stream(_NON_BLOCKING))
            self._streams[handle] = own, torch.cuda.ExternalStream(own.handle, device=self.device)
        return self._streams[handle]

    def launch(
        self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic | TensorMap, ...],
        shared_bytes: int = 0,
    ) -> None:  # fmt: skip
        function = self._in_context(lambda: self._function(kernel, arguments, shared_bytes))
        values = [each.encode() if isinstance(each, TensorMap) else each for each in arguments]
        current = torch.cuda.current_stream(self.device)

        def queue(stream: Any) -> None:
            size = (*grid, 1), (block, 1, 1)
            self._in_context(
                lambda: function.prepared_async_call(*size, stream, *values, shared_size=shared_bytes)
            )

        if not current.cuda_stream:
            queue(None)
            return
        own, seen_by_torch = self._beside(current)
        seen_by_torch.wait_stream(current)
        queue(own)
        current.wait_stream(seen_by_torch)


class CudaCoreDriver:
    """Loads through cuda.core, which launches on any stream; the launch is the driver library's own, for
    cuda.core passes no tensor map of another maker and raises no limit of shared memory."""

    NEEDS = ("Device", "ObjectCode.from_fatbin", "Kernel.handle")

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        from cuda.core import Device, ObjectCode

        self.device = device
        self.processors = _count_processors(device)
        self._device = Device(device.index)
        self._device.set_current()
        self._code = ObjectCode.from_fatbin(fatbin, name="rfengine")
        self._functions: dict[str, ctypes.c_void_p] = {}

    def _function(self, kernel: str, shared_bytes: int) -> ctypes.c_void_p:
        if kernel not in self._functions:
            function = ctypes.c_void_p()
            handle = ctypes.c_void_p(int(self._code.get_kernel(kernel).handle))
            _require(kernel, driver_library().cuKernelGetFunction(ctypes.byref(function), handle))
            if shared_bytes:
                attribute = (_SHARED_BYTES_ATTRIBUTE, shared_bytes)
                _require(kernel, driver_library().cuFuncSetAttribute(function, *attribute))
            self._functions[kernel] = function
        return self._functions[kernel]

    def launch(
        self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic | TensorMap, ...],
        shared_bytes: int = 0,
    ) -> None:  # fmt: skip
        self._device.set_current()  # per thread
        function = self._function(kernel, shared_bytes)
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream or _LEGACY_STREAM)
        values = [each.encode() if isinstance(each, TensorMap) else each.tobytes() for each in arguments]
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
        pointers = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        size = (*grid, 1, block, 1, 1, shared_bytes)
        _require(kernel, driver_library().cuLaunchKernel(function, *size, stream, pointers, None))


def _require(kernel: str, failure: int) -> None:
    if failure:
        raise RuntimeError(f"the driver refuses {kernel} with CUDA error {failure}; use another backend")


# in the order of preference
LOADERS: dict[str, type[PyCudaDriver] | type[CudaCoreDriver]] = {
    "pycuda.driver": PyCudaDriver,
    "cuda.core": CudaCoreDriver,
}


def _loader() -> tuple[type[PyCudaDriver] | type[CudaCoreDriver] | None, str]:
    """The first loader that can be imported and has what is used of it, or None and why none can."""
    failures = []
    for module, driver in LOADERS.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            failures.append(f"{module}: {error}")
            continue
        missing = [path for path in driver.NEEDS if not _has(found, path)]
        if not missing:
            return driver, ""
        failures.append(f"{module} of this version has no {', '.join(missing)}: install a later one")
    return None, "; ".join(failures)


def _has(found: Any, path: str) -> bool:
    """Whether `found` has what `path` names, which may be an attribute of an attribute."""
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def absence(device: torch.device | str = "cuda", fatbin: Path = FATBIN) -> str:
    """Why the native kernels cannot run on `device`, with the way out; "" where they can."""
    if not fatbin.is_file():
        return f"{fatbin.name} is not built; install with RFENGINE_NATIVE=1 where cmake and nvcc are"
    if torch.device(device).type != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    driver, failures = _loader()
    if driver is None:
        return (
            f"neither PyCUDA nor cuda.core can be used ({failures}); pip install cuda-core, or build "
            "PyCUDA from its source archive, for it has no wheel: CUDA_ROOT set, without cuRAND"
        )
    return ""


def load_driver(device: torch.device | str = "cuda") -> Driver:
    """The driver for a CUDA device, loaded once. Raises RuntimeError with the reason where it cannot be."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _load(device)


@cache
def _load(device: torch.device) -> Driver:
    reason = absence(device)
    if reason:
        raise RuntimeError(f"the native kernels cannot run: {reason}")
    driver, _ = _loader()
    assert driver is not None, "absence() has tried it"
    return driver(FATBIN.read_bytes(), device)
