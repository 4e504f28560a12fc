"""What every test shares: one thread, no network, a state folder of its own, and one tiny base model per session."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

# Before any Hugging Face library is imported: a test that needs the network is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What fixtures of a module or session do is recorded nowhere: no folder lies below a file.
os.environ["ADAPTERMIX_STATE"] = str(Path(__file__) / "nowhere")

import pytest
import torch
from hypothesis import HealthCheck, settings

from .factories import tiny_llama
from .tiny import tiny_causal, tiny_encoder

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


_NUMBERS = count()
ROOT = Path(__file__).parent.parent
# Quick tests by the part of the package that they cover: folders, files or single tests.
QUICK: dict[str, list[str]] = json.loads((ROOT / "tests" / "quick.json").read_text(encoding="utf-8"))


def quick_places() -> list[str]:
    """Return the quick tests, each once."""
    return sorted({place for places in QUICK.values() for place in places})


def _is_under(test: str, places: Sequence[str]) -> bool:
    return any(test == place or test.startswith((f"{place}/", f"{place}::", f"{place}[")) for place in places)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden")
    group.addoption("--update-golden", action="store_true", help="rewrite the snapshots of tests/golden")
    group.addoption("--update-messages", action="store_true", help="rewrite tests/messages.json")
    group.addoption("--golden-bytes", action="store_true", help="compare whole files in tests/golden")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-golden rewrites one file: use it in one process (-n 0)")
    if config.getoption("markexpr") == "quick" and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        # Importing all test files would take as long as the quick ones run.
        config.args[:] = [str(ROOT / place) for place in quick_places()]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = quick_places()
    for item in items:
        if _is_under(item.nodeid, places):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of each test for what is kept between runs; not there before something is."""
    folder = tmp_path_factory.getbasetemp() / "state" / str(next(_NUMBERS))
    monkeypatch.setenv("ADAPTERMIX_STATE", str(folder))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama: 4 layers, hidden size 32, 101 tokens; never written to."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a byte tokenizer and a chat template; never written to."""
    return tiny_causal(tmp_path_factory.mktemp("models") / "causal", chat=True)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of such a model whose rows are whole blocks of a 4-bit format; never written to."""
    return tiny_causal(tmp_path_factory.mktemp("models") / "wide", chat=True, hidden=64)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT with a byte tokenizer; never written to."""
    return tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")
