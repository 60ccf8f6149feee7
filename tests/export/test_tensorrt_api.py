"""TensorRT's package: absent, too old, of two majors, and the signatures that are used."""

from __future__ import annotations

import inspect
import logging
import sys
from types import ModuleType

import pytest
import torch

from rfengine.export.tensorrt_api import import_tensorrt, make_logger, network_flags, torch_dtypes
from support import tensorrt as fake

# what the engine uses of each class: argument names of each method, None for a property
SIGNATURES: dict[str, dict[str, list[str] | None]] = {
    "INetworkDefinition": {
        "num_inputs": None, "num_outputs": None, "get_input": ["index"], "get_output": ["index"],
    },
    "ITensor": {"name": None},
    "ITimingCache": {"serialize": []},
    "IBuilderConfig": {
        "set_memory_pool_limit": ["pool", "pool_size"],
        "create_timing_cache": ["serialized_timing_cache"],
        "set_timing_cache": ["cache", "ignore_mismatch"],
    },
    "Builder": {
        "create_network": ["flags"], "create_builder_config": [],
        "build_serialized_network": ["network", "config"],
    },
    "ParserError": {"desc": []},
    "OnnxParser": {"num_errors": None, "parse_from_file": ["model"], "get_error": ["index"]},
    "IExecutionContext": {
        "set_device_memory": ["memory", "size"], "set_tensor_address": ["name", "memory"],
        "execute_async_v3": ["stream_handle"],
    },
    "ICudaEngine": {
        "num_io_tensors": None, "device_memory_size_v2": None, "get_tensor_name": ["index"],
        "get_tensor_mode": ["name"], "get_tensor_shape": ["name"], "get_tensor_dtype": ["name"],
        "create_execution_context": ["strategy"],
    },
    "Runtime": {"deserialize_cuda_engine": ["serialized_engine"]},
}  # fmt: skip
CONSTRUCTORS = {"Builder": ["logger"], "OnnxParser": ["network", "logger"], "Runtime": ["logger"]}
MEMBERS = {
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "TensorIOMode": ["INPUT", "OUTPUT"],
    "DataType": ["FLOAT", "HALF", "BF16"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
}
FAKES = {
    "INetworkDefinition": fake.Network,
    "ITimingCache": fake.TimingCache,
    "IBuilderConfig": fake.BuilderConfig,
    "OnnxParser": fake.OnnxParser,
    "IExecutionContext": fake.ExecutionContext,
    "ICudaEngine": fake.CudaEngine,
}


def signatures_in(text: str, name: str) -> list[list[str]]:
    """Argument names of every overload that the docstring of a binding lists."""
    heads = [line for line in text.splitlines() if f"{name}(self: " in line]
    found = []
    for head in heads:
        inside = head.partition("(self: ")[2].rpartition(") ->")[0]
        found.append([part.partition(":")[0].strip() for part in inside.split(", ")[1:]])
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_installed_tensorrt_has_the_signatures_that_are_used(name: str) -> None:
    trt = pytest.importorskip("tensorrt")
    kind = getattr(trt, name)
    for member, arguments in SIGNATURES[name].items():
        binding = getattr(kind, member)
        if arguments is None:
            assert isinstance(binding, property), f"{name}.{member}"
        else:
            offered = [found[: len(arguments)] for found in signatures_in(binding.__doc__, member)]
            assert arguments in offered, f"{name}.{member}: {binding.__doc__}"
    if name in CONSTRUCTORS:
        assert CONSTRUCTORS[name] in signatures_in(kind.__init__.__doc__, "__init__")


def test_installed_tensorrt_has_the_members_that_are_used() -> None:
    trt = pytest.importorskip("tensorrt")
    for name, members in MEMBERS.items():
        assert set(members) <= set(getattr(trt, name).__members__)
    assert torch_dtypes(trt)[trt.DataType.BF16] is torch.bfloat16
    if network_flags(trt):
        assert network_flags(trt) == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    log = make_logger(trt)
    log.log(trt.ILogger.Severity.ERROR, "a reason")
    assert log.reason() == "a reason"


@pytest.mark.parametrize("name", FAKES)
def test_fake_has_the_signatures_that_are_used(name: str) -> None:
    kind = FAKES[name]
    for member, arguments in SIGNATURES[name].items():
        value = inspect.getattr_static(kind, member)
        if arguments is None:
            assert not callable(value)
        else:
            assert list(inspect.signature(value).parameters)[1:] == arguments


def test_absent_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeError) as refused:
        import_tensorrt()
    message = str(refused.value)
    assert message.startswith("TensorRT cannot be imported (") and "pip install tensorrt" in message
    assert "tensorrt_cu13_libs" in message and "\n" not in message


def test_too_old_and_unknown_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    module.__version__ = "10.0.1"
    with pytest.raises(RuntimeError, match=r"TensorRT is 10.0.1 and 10.1 or later is needed; pip install"):
        import_tensorrt()
    module.__version__ = "dev"
    with pytest.raises(RuntimeError, match="says it is version 'dev'"):
        import_tensorrt()


@pytest.mark.parametrize(("version", "flags"), [("10.1.0", 2), ("10.16.1.11", 2), ("11.4.0.106", 0)])
def test_networks_are_strongly_typed_in_both_majors(version: str, flags: int) -> None:
    assert network_flags(fake.fake_tensorrt(version)) == flags


def test_messages_of_tensorrt_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    trt = fake.fake_tensorrt("11.4.0.106")
    log = make_logger(trt)
    assert log.reason() == "TensorRT gives no reason"
    with caplog.at_level(logging.DEBUG, logger="rfengine"):
        for severity in trt.ILogger.Severity:
            log.log(severity, severity.name)
    assert [record.levelname for record in caplog.records] == [
        "WARNING",
        "WARNING",
        "WARNING",
        "DEBUG",
        "DEBUG",
    ]
    assert log.errors == ["INTERNAL_ERROR", "ERROR"]
