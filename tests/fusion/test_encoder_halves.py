"""Fusion on the encoder halves of encoder-decoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix import train_fusion

from ..halves import tiny_encoder_decoder
from .test_rivals import score, settings


@pytest.mark.parametrize("family", ["nllb", "t5"])
def test_fusion_is_trained_and_evaluated(family: str, tmp_path: Path) -> None:
    base = tiny_encoder_decoder(tmp_path / "base", family)
    train_fusion(settings(base, tmp_path, steps=3))
    assert 0 <= score(base, tmp_path, source=[str(tmp_path / "en.csv")]) <= 1
