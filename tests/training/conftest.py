"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix import train_stack, train_task

from ..tiny import tiny_causal, tiny_encoder
from .stacks import stack_settings
from .test_heads import settings_for


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def any_causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("any") / request.param, request.param)


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of another width and depth than the models on top."""
    return tiny_encoder(tmp_path_factory.mktemp("below") / "encoder", layers=2, hidden=16)


@pytest.fixture(scope="module", params=["encoder", "causal"])
def top(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def stack(top: Path, below: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stack")
    train_stack(stack_settings(top, below, folder))
    return folder / "stack"


@pytest.fixture(scope="module")
def teacher(top: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train_task(settings_for(top, folder, steps=20, head_pooling="mean"))
    return folder / "out"
