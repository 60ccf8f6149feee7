"""What every test runs under: fresh memory is NaN, torch has one thread, GPU tests need a GPU."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch

# kernels run in Triton's interpreter where there is no GPU; it is chosen before anything imports triton
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with torch.device("meta"):
    torch.empty(
        0
    )  # torch lists the factories that a device context redirects at first use: before the patch below

# a kernel in float32 is held to a convolution in float32, not in TF32, which is torch's default on a GPU
torch.backends.cudnn.allow_tf32 = False

UNINITIALISED = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


class SkipsWithoutFtfy:
    """Last of the finders: a test that comes to clean a text is skipped where ftfy is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "ftfy":
            pytest.skip("ftfy is not installed", allow_module_level=True)


def skip_tests_of_hypothesis() -> None:
    """Tests that draw their inputs are skipped; the others of their files run."""
    absent = MagicMock(__spec__=ModuleSpec("hypothesis", None))
    absent.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    absent.settings.return_value = lambda test: test
    sys.modules |= {"hypothesis": absent, "hypothesis.strategies": absent.strategies}


def pytest_configure(config: pytest.Config) -> None:
    # a shell ignores them for its background jobs, and the processes that tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.meta_path.append(SkipsWithoutFtfy)
    if importlib.util.find_spec("hypothesis") is None:
        skip_tests_of_hypothesis()
    # workers that each start a thread per core take the cores from one another, and so do their children; and
    # with several threads a stream on a CPU is a chunk ahead by default
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if "soak" in item.keywords])
        items[:] = [item for item in items if "soak" not in item.keywords]
    # files with slow tests come first, so that the last of them does not keep one worker alone
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Exempt what has been imported, most of all objects, from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise nanobind reports the exempt objects as leaks at exit


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves uninitialised with NaN, so that reading it before writing it fails the test."""
    for owner, name in UNINITIALISED:
        monkeypatch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))


def _filled_with_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_nan
