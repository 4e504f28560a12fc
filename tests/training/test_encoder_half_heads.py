"""Heads on the encoder halves of encoder-decoders, through the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix import evaluate, merge, train_task
from adaptermix.adapters import open_adapter
from adaptermix.models.base import load_base
from adaptermix.tasks import get_task
from adaptermix.tasks.heads.from_adapters import head_of

from ..halves import tiny_encoder_decoder
from .test_heads import evaluated, settings_for, write_labels


@pytest.mark.parametrize("family", ["nllb", "mbart", "mt5"])
def test_a_head_is_trained_merged_and_evaluated(family: str, tmp_path: Path) -> None:
    base = tiny_encoder_decoder(tmp_path / "base", family)
    train_task(settings_for(base, tmp_path, steps=20))
    data = write_labels(tmp_path, "test.de.tsv")
    alone = evaluate(evaluated(base, tmp_path / "out", data))
    merge([tmp_path / "out", tmp_path / "out"], weights=[0.5, 0.5], out=tmp_path / "both")
    both = evaluate(evaluated(base, tmp_path / "both", data))
    assert alone.scores == both.scores
    source = open_adapter(tmp_path / "out")
    head = head_of(get_task("classify"), [source], [])
    assert head
    headed = load_base(str(base), device="cpu", dtype="float32", head=head)
    assert headed.kind == "encoder"
    assert not [name for name, _ in headed.model.named_modules() if "decoder" in name]
    assert all("encoder." in path for path in source.modules)
