"""Adapters and data for tests of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptermix.options import TaskSettings
from adaptermix.training.task import train_task
from tests.factories import peft_lora
from tests.fusion.test_commands import write_rows
from tests.training.data import write_slots

TEXTS = ["red", "a blue house", "go to the green tree", "white", "one two three four five six"]
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


def write_texts(folder: Path, name: str, texts: list[str]) -> str:
    (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(causal: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs of a language model, and one with a head of an encoder; their data."""
    into = tmp_path_factory.mktemp("statistics")
    for seed, name in enumerate(("one", "two")):
        peft_lora(causal, into / name, seed=seed, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    rows = write_rows(into, "en.csv", says=True)
    train_task(
        TaskSettings(
            base=str(encoder), task="classify", train=[rows], steps=4, rank=2, out=str(into / "headed"), **COMMON
        )
    )
    write_slots(into)
    write_texts(into, "one.txt", TEXTS)
    write_texts(into, "two.txt", [f"{text} there" for text in TEXTS[::-1]])
    return into
