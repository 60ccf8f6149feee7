"""A checkpoint directory that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.models import small_pipeline, write_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of random weights that makes videos of 32 x 48 pixels."""
    return write_pipeline(tmp_path_factory.mktemp("model"), small_pipeline())
