"""Two adapters for tests of forms and of whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from ..factories import write_lora as write_adapter

Q, V, UP = "layers.0.q", "layers.0.v", "layers.1.up"
MODULES = {Q: (6, 10, 2), V: (5, 12, 3), UP: (9, 7, 1)}
NAMES = ["task", "align"]
Adapters = tuple[list[Path], list[dict[str, Tensor]]]


@pytest.fixture
def pair(tmp_path: Path) -> Adapters:
    """Two adapters and their exact deltas."""
    deltas = [write_adapter(tmp_path / name, MODULES, alpha=4, seed=seed) for seed, name in enumerate(NAMES, 1)]
    return [tmp_path / name for name in NAMES], deltas
