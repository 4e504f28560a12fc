"""The demo on its real base model, with three seeds: minutes, so only where $ADAPTERMIX_DEMO names a folder for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adaptermix.demo.run import run_demo
from adaptermix.demo.words import verdict
from adaptermix.options import DemoSettings

CACHE = os.environ.get("ADAPTERMIX_DEMO", "")

pytestmark = pytest.mark.skipif(not CACHE, reason="needs a folder for the real model in $ADAPTERMIX_DEMO")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_merge_helps_in_languages_without_task_data(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERMIX_CACHE", CACHE)
    results = run_demo(DemoSettings(out=str(tmp_path / "out"), seed=seed, device="cpu"))
    assert verdict(results).startswith("The merge helps in languages without task data, beyond chance: +")
    assert results["difference"]["transfer"]["value"] > 0
