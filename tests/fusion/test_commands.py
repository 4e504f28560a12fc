"""`train-fusion` and `evaluate --source` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix.adapters import open_adapter
from adaptermix.evaluation import evaluate
from adaptermix.fusion import FUSIONS
from adaptermix.options import EvaluateSettings, FusionSettings
from adaptermix.training.fusion import train_fusion
from tests.tiny import tiny_encoder
from tests.training.data import Notes

from ..refusals import refuses

WORDS = ["good", "bad", "fine", "poor", "nice", "weak"]


def write_rows(folder: Path, name: str, *, says: bool, count: int = 24) -> str:
    """Rows whose label only the one side tells: a word of praise, or noise."""
    lines = ["text,label"]
    for number in range(count):
        label = ("positive", "negative")[number % 2]
        text = f"it is {'good' if number % 2 == 0 else 'bad'}" if says else f"xq {number % 7} zw"
        lines.append(f"{text},{label}")
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def settings(base: Path, folder: Path, **more: Any) -> FusionSettings:
    common = {
        "base": str(base),
        "task": "classify",
        "train": [write_rows(folder, "jv.csv", says=False)],
        "source": [write_rows(folder, "en.csv", says=True)],
        "out": str(folder / "fused"),
        "device": "cpu",
        "dtype": "float32",
        "rank": 4,
        "dropout": 0.0,
        "learning_rate": 2e-2,
        "steps": 40,
        "batch_size": 8,
    }
    return FusionSettings(**{**common, **more})


def asked(base: Path, folder: Path, *, name: str = "fused", **more: Any) -> EvaluateSettings:
    data = [str(folder / "jv.csv")]
    adapter = str(folder / name)
    return EvaluateSettings(
        base=str(base), adapter=adapter, task="classify", data=data, device="cpu", dtype="float32", **more
    )


def score(base: Path, folder: Path, **more: Any) -> float:
    return evaluate(asked(base, folder, **more)).overall.value


@pytest.mark.parametrize("fusion", ["add", "gated", "cross-attention"])
def test_what_only_the_source_tells_is_learned_and_asked_for(fusion: str, encoder: Path, tmp_path: Path) -> None:
    report = train_fusion(settings(encoder, tmp_path, fusion=fusion))
    assert report.steps == 40
    assert score(encoder, tmp_path, source=[str(tmp_path / "en.csv")]) > 0.95
    notes = Notes()
    assert evaluate(asked(encoder, tmp_path), watch=notes).overall.value < 0.8
    assert any("without sources a fused adapter is a plain LoRA" in note for note in notes.said)
    document = json.loads((tmp_path / "fused" / "adaptermix.json").read_text())
    assert document["kind"] == "train-fusion"
    assert document["fusion"]["fusion"] == fusion
    assert open_adapter(tmp_path / "fused").meta.fusion["fusion"] == fusion
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "load_fusion(base, " in card
    assert "PEFT alone loads a plain LoRA" in card


def test_generated_answers_learn_from_the_source_too(causal: Path, tmp_path: Path) -> None:
    train_fusion(
        settings(
            causal,
            tmp_path,
            steps=60,
            alignment="end",
            targets=["all-linear"],
            rank=16,
            learning_rate=1e-2,
            dev=[str(write_rows(tmp_path, "dev.jv.csv", says=False, count=8))],
            dev_source=[write_rows(tmp_path, "dev.en.csv", says=True, count=8)],
        )
    )
    with_source = score(causal, tmp_path, source=[str(tmp_path / "en.csv")], max_new_tokens=12)
    assert with_source > 0.9
    assert with_source == score(causal, tmp_path, source=[str(tmp_path / "en.csv")], max_new_tokens=12, batch_size=1)
    assert score(causal, tmp_path, max_new_tokens=12) < 0.8


def test_batches_of_which_some_sources_are_known_and_of_other_sizes_are_read(encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "more.jv.csv", says=False, count=23)
    source = write_rows(tmp_path, "more.en.csv", says=True, count=23)
    train_fusion(settings(encoder, tmp_path, steps=9, batch_size=5, train=[rows], source=[source]))
    found = score(encoder, tmp_path, source=[str(tmp_path / "en.csv")], batch_size=7)
    assert found == score(encoder, tmp_path, source=[str(tmp_path / "en.csv")], batch_size=24)


def test_gradient_checkpointing_gives_the_same_adapter(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train_fusion(settings(encoder, tmp_path, steps=5))
    once = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    train_fusion(settings(encoder, tmp_path, steps=5, overwrite=True, gradient_checkpointing=True))
    twice = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert once.keys() == twice.keys()
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_is_trained_and_read(fusion: str, encoder: Path, tmp_path: Path) -> None:
    report = train_fusion(settings(encoder, tmp_path, fusion=fusion, steps=40))
    found = score(encoder, tmp_path, source=[str(tmp_path / "en.csv")])
    # in equation 3 the source has no values, so it alone cannot tell the answer
    assert report.history[-1]["loss"] < 1 if fusion == "cross-attention-paper" else found > 0.9


def test_a_fused_adapter_is_not_merged_or_fed_in_silence(encoder: Path, tmp_path: Path) -> None:
    from adaptermix import merge

    train_fusion(settings(encoder, tmp_path, steps=1))
    with refuses("adapters.fusion"):
        merge([tmp_path / "fused", tmp_path / "fused"], weights=[0.5, 0.5])
    with refuses("fusion.source-rows"):
        score(encoder, tmp_path, source=[write_rows(tmp_path, "few.en.csv", says=True, count=5)])
    with refuses("fusion.source-rows"):
        train_fusion(settings(encoder, tmp_path, source=[str(tmp_path / "few.en.csv")], overwrite=True))


@pytest.mark.parametrize("more", [{}, {"fusion": "x-mixup"}, {"fusion": "cross-attention", "source_encoder": "mt"}])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    more: dict[str, Any], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.training.trainer import Interrupted, Trainer

    if "source_encoder" in more:
        more = more | {"source_encoder": str(tiny_encoder(tmp_path / "mt", layers=2, hidden=24))}
    given = {"steps": 6, "checkpoint_every": 1, **more}
    train_fusion(settings(encoder, tmp_path, out=str(tmp_path / "whole"), **given))
    before = Trainer._step

    def step(self: Trainer, loss_of: Any) -> Any:
        if self.done == 3:
            raise Interrupted
        return before(self, loss_of)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(Interrupted):
        train_fusion(settings(encoder, tmp_path, **given))
    monkeypatch.setattr(Trainer, "_step", before)
    train_fusion(settings(encoder, tmp_path, resume=True, **given))
    whole, gone_on = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "fused"))
    assert whole == gone_on
