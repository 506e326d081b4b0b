"""Fixtures of the journeys: a tiny model directory, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journeys import toy


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory; nothing may change it."""
    return toy.write(tmp_path_factory.mktemp("toy") / "model")
