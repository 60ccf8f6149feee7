"""TensorRT's Python package on request, and what differs between its releases.

The engine uses the names and signatures of the bindings 10.1 to 11.4 that tests/export/test_tensorrt_api.py
lists. TensorRT 11 has strongly typed networks only; 10 needs a flag for one.
"""

from __future__ import annotations

import importlib
import logging
import re
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

HOW_TO_GET = (
    "pip install tensorrt, with NVIDIA's package index as --extra-index-url where its libraries "
    "(tensorrt_cu13_libs) are not found"
)
_OLDEST = (10, 1)  # the first whose caller allocates the memory for activations
_TYPED_ALWAYS = 11  # from here on every network is strongly typed
_RELEASE = re.compile(r"(\d+)\.(\d+)")


def import_tensorrt() -> ModuleType:
    """The package. Raises RuntimeError, with the way to get it, when it is missing, incomplete or too old."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:  # the bindings alone fail here, for want of their libraries
        raise RuntimeError(f"TensorRT cannot be imported ({error}); {HOW_TO_GET}") from error
    if release(trt) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise RuntimeError(f"TensorRT is {trt.__version__} and {oldest} or later is needed; {HOW_TO_GET}")
    return trt


def release(trt: ModuleType) -> tuple[int, int]:
    """Major and minor version. Raises RuntimeError for a version without them."""
    found = _RELEASE.match(trt.__version__)
    if found is None:
        raise RuntimeError(f"TensorRT says it is version {trt.__version__!r}; {HOW_TO_GET}")
    return int(found[1]), int(found[2])


def network_flags(trt: ModuleType) -> int:
    """Flags of a strongly typed network: the types of the ONNX file are the types of the engine."""
    if release(trt)[0] >= _TYPED_ALWAYS:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def torch_dtypes(trt: ModuleType) -> dict[Any, torch.dtype]:
    """torch's dtype for each data type that a binding may have."""
    kinds = trt.DataType
    return {kinds.FLOAT: torch.float32, kinds.HALF: torch.float16, kinds.BF16: torch.bfloat16}


def make_logger(trt: ModuleType) -> Any:
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
