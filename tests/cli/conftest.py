"""A checkpoint directory that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfengine.checkpoint.checkpoint import write_config
from rfengine.checkpoint.loader import save_weights
from rfengine.models.text_encoder import build_umt5
from support.models import small_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of random weights that makes videos of 32 x 48 pixels."""
    directory = tmp_path_factory.mktemp("model")
    pipeline = small_pipeline()
    write_config(directory, pipeline.config)
    parts = {
        "transformer": pipeline.model,
        "vae": pipeline.vae,
        "text_encoder": build_umt5(pipeline.config.text),
    }
    for name, module in parts.items():
        tensors = {key: value for key, value in module.state_dict().items() if "embed_tokens" not in key}
        save_weights(directory / f"{name}.safetensors", tensors)
    return directory
