"""Small stacks: their texts, their settings, and stacks that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from adaptermix import StackSettings
from adaptermix.models.base import load_base

from .data import COLOURS
from .test_heads import write_labels
from .test_joint import values

TEXTS = [f"{pre} {colour} {noun}" for pre in ("the", "a") for colour in COLOURS for noun in ("sky", "sea", "hill")]


def write_texts(folder: Path, name: str = "en.txt", texts: list[str] = TEXTS) -> str:
    (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return str(folder / name)


def stack_settings(top: Path, below: Path, folder: Path, **more: Any) -> StackSettings:
    own = {"encoder": str(below), "texts": [write_texts(folder)], "steps": 6, "out": str(folder / "stack")}
    return StackSettings(**values(top, folder, **(own | more)))


def loaded(path: Path) -> Any:
    return load_base(str(path), device="cpu", dtype="float32")


def batch_of(tokenizer: Any, texts: list[str] = TEXTS[:3]) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))


def stage_2(stack: Path, teacher: Path, folder: Path, **more: Any) -> StackSettings:
    own = {"teacher": str(teacher), "task": "classify", "train": [write_labels(folder)], "steps": 3}
    return StackSettings(**values(stack, folder, **(own | more)))
