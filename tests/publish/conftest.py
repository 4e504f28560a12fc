"""A merged adapter, and a Hub on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptermix import merge

from ..factories import write_lora
from .loopback import Hub, serving

MODULES = {"model.layers.0.q_proj": (6, 4, 2)}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, MODULES, seed=seed)
    merge([tmp_path / "task", tmp_path / "align"], weights=[0.9], out=tmp_path / "merged")
    return tmp_path / "merged"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each pause of a push; none of them passes."""
    found: list[float] = []
    short = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(seconds) if seconds >= 0.5 else short(seconds))
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Iterator[Hub]:
    from huggingface_hub import close_session, constants

    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
        yield served
        close_session()
