"""What every test shares: one thread, no network, and one tiny base model per session."""

from __future__ import annotations

import os
from pathlib import Path

# Before any Hugging Face library is imported: a test that needs the network is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

from .factories import tiny_llama

torch.set_num_threads(1)
settings.register_profile(
    "adaptermix",
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("adaptermix")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama: 4 layers, hidden size 32, 101 tokens; never written to."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
