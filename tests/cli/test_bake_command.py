"""`adaptermix bake` as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptermix.cli import main
from tests.factories import peft_lora


def call(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_bake_tells_what_is_kept_and_writes_a_model(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = peft_lora(wide, tmp_path / "one", seed=1, r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
    common = f"bake --base {wide} --adapter {one} --device cpu"
    code, out, _ = call(f"{common} --out {tmp_path / 'whole'} --json", capsys)
    assert code == 0
    document = json.loads(out)
    assert {"strategy", "kept", "error", "modules", "bytes"} <= set(document)
    assert set(document["modules"]) == {f"model.layers.{n}.self_attn.{m}_proj" for n in range(4) for m in "qv"}
    assert all({"strategy", "kept", "error", "codes_changed"} <= set(m) for m in document["modules"].values())
    assert (tmp_path / "whole" / "model.safetensors").exists()
    code, _, said = call(f"{common} --out {tmp_path / 'whole'}", capsys)
    assert code == 1
    assert "exists. Pass --overwrite" in said
    code, _, said = call(f"{common} --out {tmp_path / 'x'} --strategy calibrated", capsys)
    assert code == 2
    assert "add --quantize nf4" in said


def test_a_dry_run_says_what_plain_merging_would_keep(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    one = peft_lora(wide, tmp_path / "one", seed=1, r=2, lora_alpha=0.01, target_modules=["q_proj"])
    line = f"bake --base {wide} --adapter {one} --quantize nf4 --strategy requantize --dry-run --out {tmp_path / 'x'}"
    code, _, said = call(f"{line} --device cpu", capsys)
    assert code == 0
    assert "wrote nothing" in said
    assert "4 requantize" in said
    assert not (tmp_path / "x").exists()
    code, _, said = call(f"{line.replace('--dry-run', '')} --device cpu", capsys)
    assert code == 1
    assert "must be kept, and strategy 'requantize' keeps" in said
    assert not (tmp_path / "x").exists()


def test_what_is_kept_without_first_tokens_is_shown_and_lost_modules_are_named(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    one = peft_lora(wide, tmp_path / "one", seed=1, r=2, lora_alpha=0.002, target_modules=["q_proj"])
    (tmp_path / "texts.txt").write_text("\n".join(f"text {n} of {n * n}" for n in range(40)))
    line = f"bake --base {wide} --adapter {one} --quantize nf4 --strategy requantize --keep-at-least 0 --device cpu"
    code, _, said = call(f"{line} --calibration {tmp_path / 'texts.txt'} --out {tmp_path / 'x'}", capsys)
    assert code == 0
    assert "kept, rest" in said
    assert "error, rest" in said
    document = json.loads((tmp_path / "x" / "adaptermix.json").read_text())["fidelity"]
    told = f"without the first token of each text (rest): kept {document['kept_rest']:.3f}, error "
    assert told + f"{document['error_rest']:.3f}" in said
    errors = ("error", "error_rest", "error_even")
    lost = [path for path, module in document["modules"].items() if max(module[name] for name in errors) >= 1]
    assert lost
    assert f"note: in {len(lost)} of 4 modules the error is as large as the adapter's effect ({lost[0]}" in said
    assert "--strategy auto keeps such modules in 16 bits" in said
