"""The kernels of csrc/: finds the fatbin, loads it through PyCUDA or cuda.core, and launches on torch's
stream.

Both loaders work on the primary context of the device, the one torch uses, so pointers of tensors are valid
as they are, and a launch is captured by a CUDA graph like any other. Importing this needs torch alone.
Shapes: L layers, B batch, S arena tokens, N sink tokens, T frames, H heads (or rows of pixels), E head dim,
W columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy import generic

FATBIN = Path(__file__).with_name("_native.fatbin")
THREADS = 256  # of every block, as in csrc/scalars.cuh
RUN = 16  # pixels of one row that a thread packs, as in csrc/frame_pack.cuh
VECTOR_BYTES = 16
# blocks of a launch: four waves of 8 blocks on each of 132 multiprocessors; unmeasured
TARGET_BLOCKS = 4096
MAX_GRID_Y = 65535
_SUFFIXES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY: torch writes the same stream as 0
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no ordering with the default stream, as torch's own side streams


class Driver(Protocol):
    """Launches the kernels of the fatbin on one device."""

    device: torch.device

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        """Queue a kernel on torch's current stream. arguments: numpy scalars of the width the kernel
        declares."""


class PyCudaDriver:
    """Loads through PyCUDA.

    PyCUDA launches on its default stream or on streams it made, never on a foreign one. A launch that torch
    has on a side stream therefore goes to a stream of PyCUDA's that waits for torch's and is waited for; a
    capture follows these events, so that in a graph they cost nothing.
    """

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self.device = device
        self._cuda = cuda
        self._context = cuda.Device(device.index).retain_primary_context()
        self._module = self._in_context(lambda: cuda.module_from_buffer(fatbin))
        self._functions: dict[str, Any] = {}
        self._streams: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def _in_context(self, action: Callable[[], Any]) -> Any:
        """PyCUDA's stack of contexts is its own, one for each thread: ours is on it only for as long as
        needed."""
        self._context.push()
        try:
            return action()
        finally:
            self._cuda.Context.pop()

    def _function(self, kernel: str, arguments: tuple[generic, ...]) -> Any:
        if kernel not in self._functions:
            function = self._module.get_function(kernel)
            self._functions[kernel] = function.prepare([argument.dtype for argument in arguments])
        return self._functions[kernel]

    def _beside(self, current: torch.cuda.Stream) -> tuple[Any, torch.cuda.Stream]:
        """A stream of PyCUDA's for one of torch's: never shared by two, or one capture would reach into
        another."""
        handle = current.cuda_stream
        if handle not in self._streams:
            own = self._in_context(lambda: self._cuda.Stream(_NON_BLOCKING))
            self._streams[handle] = own, torch.cuda.ExternalStream(own.handle, device=self.device)
        return self._streams[handle]

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        function = self._in_context(lambda: self._function(kernel, arguments))
        current = torch.cuda.current_stream(self.device)

        def queue(stream: Any) -> None:
            self._in_context(
                lambda: function.prepared_async_call((*grid, 1), (block, 1, 1), stream, *arguments)
            )

        if not current.cuda_stream:
            queue(None)
            return
        own, seen_by_torch = self._beside(current)
        seen_by_torch.wait_stream(current)
        queue(own)
        current.wait_stream(seen_by_torch)


class CudaCoreDriver:
    """Loads through cuda.core, which launches on any stream."""

    def __init__(self, fatbin: bytes, device: torch.device) -> None:
        from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

        self.device = device
        self._device = Device(device.index)
        self._device.set_current()
        self._code = ObjectCode.from_fatbin(fatbin, name="rfengine")
        self._config, self._stream, self._launch = LaunchConfig, Stream.from_handle, launch
        self._kernels: dict[str, Any] = {}

    def launch(self, kernel: str, grid: tuple[int, int], block: int, arguments: tuple[generic, ...]) -> None:
        self._device.set_current()  # per thread
        if kernel not in self._kernels:
            self._kernels[kernel] = self._code.get_kernel(kernel)
        stream = self._stream(torch.cuda.current_stream(self.device).cuda_stream or _LEGACY_STREAM)
        self._launch(stream, self._config(grid=grid, block=block), self._kernels[kernel], *arguments)


# in the order of preference
LOADERS: dict[str, type[PyCudaDriver] | type[CudaCoreDriver]] = {
    "pycuda.driver": PyCudaDriver,
    "cuda.core": CudaCoreDriver,
}


def _loader() -> tuple[type[PyCudaDriver] | type[CudaCoreDriver] | None, str]:
    """The first loader that can be imported, or None and why none can."""
    failures = []
    for module, driver in LOADERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            failures.append(f"{module}: {error}")
        else:
            return driver, ""
    return None, "; ".join(failures)


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
            f"neither PyCUDA nor cuda.core can be imported ({failures}); pip install cuda-core, or build "
            "PyCUDA from its source archive, for it has no wheel: CUDA_ROOT set, without cuRAND"
        )
    return ""


def load_driver(device: torch.device | str = "cuda") -> Driver:
    """The driver for a CUDA device, loaded once. Raises RuntimeError with the reason where it cannot be."""
    reason = absence(device)
    if reason:
        raise RuntimeError(f"the native kernels cannot run: {reason}")
    index = torch.device(device).index
    return _load(torch.cuda.current_device() if index is None else index)


@cache
def _load(index: int) -> Driver:
    driver, _ = _loader()
    assert driver is not None, "absence() is asked first"
    return driver(FATBIN.read_bytes(), torch.device("cuda", index))


def evict_and_rephase(
    keys: Tensor,
    values: Tensor,
    raw_keys: Tensor,
    low: tuple[Tensor, Tensor] | None,
    rotation: Tensor,
    sink_tokens: int,
    leaving_start: int,
    alpha: float,
    driver: Driver | None = None,
) -> None:
    """reference.ema_evict of the chunk that leaves, then reference.rephase_keys of all that stays, in one
    launch.

    keys, values, raw_keys: arenas [L, B, S, H, E], changed in place: the first sink_tokens of values and
    raw_keys are averaged with the sink_tokens from leaving_start on, and keys become the rotated raw keys.
    Those of the leaving chunk stay as they are: its slot is overwritten next. low: what rounding took from
    the sink's keys and values, [L, B, N, H, E] each, changed in place; None without split precision.
    rotation: [2, tokens filled, E / 2], float32. Bit for bit the reference. Raises ValueError for tensors
    that the kernel's 16-byte accesses cannot serve.
    """
    driver = driver or load_driver(keys.device)
    suffix = _suffix(keys)
    layers, batch, tokens, heads, head_dim = _arena("keys", keys)
    for name, arena in (("values", values), ("raw_keys", raw_keys)):
        _check(arena.shape == keys.shape and arena.dtype == keys.dtype and arena.stride() == keys.stride(),
               f"{name} is {_layout(arena)} and keys {_layout(keys)}; they must be alike")  # fmt: skip
    filled = rotation.shape[1]
    _check(
        rotation.shape == (2, filled, head_dim // 2) and rotation.dtype == torch.float32 and filled <= tokens,
        f"rotation is {_layout(rotation)}; it must be float32 [2, up to {tokens}, {head_dim // 2}]",
    )
    _check(rotation.is_contiguous(), f"rotation is {_layout(rotation)}; pass it contiguous")
    _check(
        0 < sink_tokens <= leaving_start <= filled - sink_tokens,
        f"a chunk of {sink_tokens} tokens cannot leave from token {leaving_start}; it must lie behind the "
        f"sink, within the {filled} tokens filled",
    )
    low_keys, low_values = low or (None, None)
    if low_keys is not None and low_values is not None:
        _arena("the remainder", low_keys)
        expected = (layers, batch, sink_tokens, heads, head_dim)
        same = low_keys.shape == low_values.shape == expected and low_keys.stride() == low_values.stride()
        _check(
            same and low_keys.dtype == low_values.dtype == keys.dtype,
            f"the sink's remainders are {_layout(low_keys)} and {_layout(low_values)}; they must be alike, "
            f"{keys.dtype} {expected}",
        )
    tensors = (keys, values, raw_keys, low_keys, low_values, rotation)
    _check_addresses(driver, tensors)
    strides = (*keys.stride()[:2], *(low_keys.stride()[:2] if low_keys is not None else (0, 0)))
    sizes = (layers, batch, heads, head_dim, sink_tokens, leaving_start, filled)
    arguments = _arguments(tensors, strides, sizes, (alpha, 1 - alpha))
    columns = head_dim * keys.element_size() // VECTOR_BYTES
    driver.launch(
        f"evict_and_rephase_{suffix}",
        _grid((filled - sink_tokens) * columns, layers * batch),
        THREADS,
        arguments,
    )


def frame_pack(pixels: Tensor, driver: Driver | None = None) -> Tensor:
    """reference.frame_pack: decoded pixels [3, T, H, W] to RGB24, uint8 [T, H, W, 3], bit for bit.

    The rows of a frame must lie one below the other (ValueError); the strides of channel and frame are free.
    """
    _, frames, height, width = _frames(pixels)
    packed = torch.empty((frames, height, width, 3), dtype=torch.uint8, device=pixels.device)
    runs = -(-height * width // RUN)
    _pack("rgb24", pixels, packed, runs, height * width % RUN == 0, driver)
    return packed


def frame_pack_nv12(pixels: Tensor, driver: Driver | None = None) -> Tensor:
    """reference.frame_pack_nv12: decoded pixels [3, T, H, W] to NV12, uint8 [T, H * 3 / 2, W], bit for bit.

    Strides as for frame_pack. Raises ValueError for an odd height or width.
    """
    _, frames, height, width = _frames(pixels)
    _check(
        height % 2 == width % 2 == 0,
        f"frames are {height} x {width}; NV12 needs even sides: crop or pad them",
    )
    packed = torch.empty((frames, height * 3 // 2, width), dtype=torch.uint8, device=pixels.device)
    runs = -(-width // RUN) * (height // 2)
    _pack("nv12", pixels, packed, runs, width % RUN == 0, driver)
    return packed


def _pack(form: str, pixels: Tensor, packed: Tensor, runs: int, whole: bool, driver: Driver | None) -> None:
    """Launch with 16-byte accesses where every run is whole and aligned, else with single ones."""
    driver = driver or load_driver(pixels.device)
    _check_device(driver, (pixels, packed))
    channel, frame = pixels.stride()[:2]
    offsets = (pixels.data_ptr(), *(stride * pixels.element_size() for stride in (channel, frame)))
    vectors = whole and all(offset % VECTOR_BYTES == 0 for offset in offsets)
    _, frames, height, width = pixels.shape
    arguments = _arguments((pixels, packed), (channel, frame), (frames, height, width, int(vectors)), ())
    driver.launch(f"frame_pack_{form}_{_suffix(pixels)}", _grid(runs, frames), THREADS, arguments)


def _grid(threads: int, rows: int) -> tuple[int, int]:
    """Blocks for `threads` threads, times the rows that run side by side; a thread goes through the others
    in turn."""
    blocks = -(-threads // THREADS)
    return blocks, max(1, min(rows, -(-TARGET_BLOCKS // blocks), MAX_GRID_Y))


def _arguments(
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    factors: tuple[float, ...],
) -> tuple[generic, ...]:
    """Every kernel's parameters: pointers, strides (int64), sizes (int32), factors (float32), in this
    order."""
    import numpy

    return (
        *(numpy.uint64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *map(numpy.int64, strides),
        *map(numpy.int32, sizes),
        *map(numpy.float32, factors),
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def _suffix(tensor: Tensor) -> str:
    _check(
        tensor.dtype in _SUFFIXES,
        f"the native kernels serve bfloat16, float16 and float32, not {tensor.dtype}",
    )
    return _SUFFIXES[tensor.dtype]


def _arena(name: str, arena: Tensor) -> torch.Size:
    _check(arena.ndim == 5, f"{name} is {tuple(arena.shape)}; it must be [L, B, S, H, E]")
    heads, head_dim = arena.shape[3:]
    dense = arena.stride()[2:] == (heads * head_dim, head_dim, 1)
    _check(dense, f"{name} is {_layout(arena)}; its last three axes must be contiguous")
    lanes = VECTOR_BYTES // arena.element_size()
    whole = head_dim % lanes == 0 and all(stride % lanes == 0 for stride in arena.stride()[:2])
    _check(
        whole,
        f"{name} is {_layout(arena)}; head dim and strides must be multiples of {lanes} for 16-byte accesses",
    )
    return arena.shape


def _frames(pixels: Tensor) -> torch.Size:
    _check(
        pixels.ndim == 4 and pixels.shape[0] == 3,
        f"pixels are {tuple(pixels.shape)}; they must be [3, T, H, W]",
    )
    _check(
        pixels.stride()[2:] == (pixels.shape[3], 1),
        f"pixels are {_layout(pixels)}; the rows of a frame must be contiguous",
    )
    return pixels.shape


def _check_device(driver: Driver, tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != driver.device:
            raise ValueError(
                f"a tensor is on {tensor.device} but the kernels on {driver.device}; move it there"
            )


def _check_addresses(driver: Driver, tensors: tuple[Tensor | None, ...]) -> None:
    _check_device(driver, tensors)
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"a tensor starts at address {tensor.data_ptr()}; it must be a multiple of {VECTOR_BYTES}"
            )
