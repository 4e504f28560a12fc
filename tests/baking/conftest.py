"""What tests of baking share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path: Path) -> str:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "mix", "potions"]
    lines = [" ".join(words[(n * k) % len(words)] for k in range(1, 9)) + f" {n}" for n in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return str(tmp_path / "texts.txt")
