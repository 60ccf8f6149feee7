"""The application for Ray Serve: its options from arguments and the environment."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rfengine.serving.ray_app import app, app_options

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
ENVIRONMENT = {
    "RFENGINE_SERVE_DATA_DIRECTORY": "/data",
    "RFENGINE_SERVE_REPLICAS": "4",
    "RFENGINE_SERVE_ALLOW_ORIGIN": "https://a.example, https://b.example",
    "RFENGINE_SERVE_LOG_JSON": "true",
    "RFENGINE_API_KEYS": "not-an-option-of-the-application",
}


def test_options_come_from_the_environment_and_arguments_take_their_place() -> None:
    options = app_options({"replicas": "2", "memory_gb": "1.5"}, ENVIRONMENT)
    assert (options.data_directory, options.replicas, options.memory_gb) == (Path("/data"), 2, 1.5)
    assert options.allow_origin == ("https://a.example", "https://b.example") and options.log_json
    assert options.model == "tiny" and options.max_sessions == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": "2"}, r"^replica \(or RFENGINE_SERVE_REPLICA\): .*; there are data_directory, model, "),
        ({"replicas": "none"}, r"^replicas \(or RFENGINE_SERVE_REPLICAS\): .*integer"),
        ({"replicas": "0"}, "greater than or equal to 1"),
        ({"dtype": "int8"}, r"^dtype .*'bfloat16'"),
        ({"memory_gb": "nan"}, "memory_gb"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        app_options(arguments, ENVIRONMENT)


def test_a_data_directory_has_to_be_named() -> None:
    with pytest.raises(ValueError, match="data_directory .or RFENGINE_SERVE_DATA_DIRECTORY"):
        app_options({}, {})


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu", "replicas": "1000"}, "1000 replicas need as many cores and there are"),
        ({"device": "cpu", "runtime": '{"graph": true}'}, "graph"),
        ({"device": "cpu", "api_key_file": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_when_the_application_is_built(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        app({"data_directory": str(tmp_path), **arguments})
