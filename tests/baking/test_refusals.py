"""What a bake refuses or tells, and DoRAs, whose delta depends on the weight."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")

from adaptermix import BakeSettings, bake
from adaptermix.errors import DataError
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.models.base import load_base
from adaptermix.models.quantization import keep_codes
from tests.baking.test_bake import FEW, adapter, load, logits
from tests.baking.test_forms import quantised_by_transformers, settings
from tests.factories import peft_lora, peft_noise

from ..refusals import refuses


def dora(base: Path, folder: Path) -> Path:
    """A DoRA whose magnitudes have moved."""
    from safetensors.torch import load_file, save_file

    peft_lora(base, folder, r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = {name: value.abs() + 0.5 if "magnitude" in name else value for name, value in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("strategy", ["merge-16", "dequant-16"])
def test_a_dora_is_written_as_peft_has_it(strategy: str, wide: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    one = dora(wide, tmp_path / "one")
    quantize = "none" if strategy == "merge-16" else "nf4"
    bake(settings(wide, one, tmp_path / "out", strategy=strategy, quantize=quantize))
    base = load_base(str(wide), device="cpu", dtype="float32", quantize=quantize).model
    keep_codes(base)
    with peft_noise():
        wanted = logits(PeftModel.from_pretrained(base, str(one)).eval())
    torch.testing.assert_close(logits(load(tmp_path / "out", dtype=torch.float32)), wanted, rtol=1e-3, atol=1e-3)


def test_another_base_is_refused_and_so_is_one_that_has_the_adapter_already(wide: Path, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one")
    common: dict[str, Any] = {"allow_base_mismatch": False}
    bake(settings(wide, one, tmp_path / "whole", **common))
    with refuses("base.mismatch"):
        bake(settings(tmp_path / "whole", one, tmp_path / "twice", **common))
    quantised = quantised_by_transformers(wide, tmp_path / "base", "nf4")
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "keep", **common}
    bake(settings(quantised, one, tmp_path / "kept", **more))


def test_a_wrong_task_shows_before_codes_are_chosen(
    wide: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.baking import tensor_writer as work

    monkeypatch.setattr(work.TensorWriter, "_finish", None)
    one = adapter(wide, tmp_path / "one")
    more: dict[str, Any] = {"quantize": "nf4", "calibration": [texts]}
    with refuses("task.unknown: slots"):
        bake(settings(wide, one, tmp_path / "out", task="slotz", dev=[texts], **more))
    with pytest.raises(DataError):
        bake(settings(wide, one, tmp_path / "out", task="slots", dev=[texts], **more))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "texts.txt"]


def test_a_result_with_a_lora_beside_it_says_how_to_load_both(wide: Path, texts: str, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.02)
    out = tmp_path / "out"
    report = bake(settings(wide, one, out, quantize="nf4", strategy="residual", calibration=[texts]))
    assert any(module.rank for module in report.modules.values())
    assert "PeftModel.from_pretrained(model, \"out\", subfolder='residual')" in (out / "README.md").read_text()
    named = json.loads((out / "residual" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == out
    assert (out / "residual" / "adaptermix.json").exists()


def test_sizes_of_strategies_are_those_of_their_files(wide: Path, texts: str, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.5)
    more: dict[str, Any] = {"quantize": "nf4", "calibration": [texts], "keep_at_least": 0.0}
    dry = bake(settings(wide, one, tmp_path / "x", strategy="requantize", dry_run=True, **more)).compared()
    for strategy in ("requantize", "dequant-16"):
        wet = bake(settings(wide, one, tmp_path / strategy, strategy=strategy, **more))
        assert dry[strategy].bytes == pytest.approx(wet.bytes, rel=1e-3)
        assert dry[strategy].kept == pytest.approx(wet.overall.kept, abs=1e-6)


def test_json_under_another_name_is_no_text(wide: Path, texts: str, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"a {n}", "completion": "b"}) for n in range(60)]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    one = adapter(wide, tmp_path / "one", alpha=0.5)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "calibrated", "keep_at_least": 0.0}
    with refuses("calibration.not-jsonl"):
        bake(settings(wide, one, tmp_path / "out", calibration=[str(tmp_path / "rows.json")], **more))
    shutil.move(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    bake(settings(wide, one, tmp_path / "out", calibration=[str(tmp_path / "rows.jsonl")], **more))


def test_texts_of_which_none_falls_into_one_part_are_too_few(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is read."""
    from adaptermix.baking import run

    monkeypatch.setattr(run, "load_base", None)
    texts = [f"text {162 + number}" for number in range(20)]
    parts = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 for text in texts]
    assert 3 not in parts  # what results are chosen on
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    one = adapter(wide, tmp_path / "one", alpha=0.5)
    more: dict[str, Any] = {"quantize": "nf4", "calibration": [str(tmp_path / "texts.txt")]}
    with refuses("calibration.empty-part: 20"):
        bake(settings(wide, one, tmp_path / "out", **more))


def test_what_stands_behind_a_sentence_model_goes_with_it(encoder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(encoder, base)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    one = peft_lora(base, tmp_path / "one", r=4, target_modules=["query"], task_type=None)
    bake(BakeSettings(base=str(base), adapter=[str(one)], out=str(tmp_path / "out"), device="cpu"))
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(base).tensors.keys()
