"""Makes the interpreter round as a GPU does: on its own it truncates to bfloat16 and misrounds to float8."""

import numpy as np
import pytest
import torch

TORCH_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def round_to_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch convert floats where the interpreter runs kernels; nothing changes where a GPU does.

    Elementwise kernels become exact in every dtype this way. tl.dot on bfloat16 does not: it never converts.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def convert(values, source, target, rounding_mode):
        bits = np.ascontiguousarray(values).view(UNSIGNED[source.primitive_bitwidth // 8])
        floats = torch.from_numpy(bits.copy()).view(TORCH_DTYPES[source.name])
        rounded = floats.to(TORCH_DTYPES[target.name])
        unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[target.primitive_bitwidth // 8]
        return rounded.view(unsigned).numpy().reshape(np.shape(values))

    monkeypatch.setattr(interpreter, "_convert_float", convert)
