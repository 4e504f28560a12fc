"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..tiny import tiny_causal


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def any_causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("any") / request.param, request.param)
