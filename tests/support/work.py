"""What a piece of work costs on any machine: the operators that ran, and the tensors that live."""

from __future__ import annotations

import gc

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided)


class Work(TorchDispatchMode):
    """The operators that ran, each with the elements that it wrote: what a chunk's time follows from."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((str(func), out.numel() if isinstance(out, torch.Tensor) else 0))
        return out
