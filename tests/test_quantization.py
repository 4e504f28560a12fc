"""Bases in 4 and 8 bits: adapters are trained on them and act on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptermix import EvaluateSettings, TaskSettings, evaluate, merge, train_task
from adaptermix.models.base import load_base
from adaptermix.models.head_forms import HEAD_FORMS, Head

from .refusals import refuses
from .tiny import tiny_encoder
from .training.test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_a_lora_is_learned_on_a_quantised_base_and_acts_on_it(quantize: str, wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load_base(str(wide), device="cpu", dtype="float32", quantize=quantize)
    whole = load_base(str(wide), device="cpu", dtype="float32")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        apart = (base.model(tokens).logits - whole.model(tokens).logits).norm() / whole.model(tokens).logits.norm()
    assert 1e-4 < float(apart) < 0.5
    rows = [{"text": f"go {number}", "slots": [{"type": "c", "value": "x"}]} for number in range(6)]
    (tmp_path / "same.en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"task": "slots", "train": [str(tmp_path / "same.en.jsonl")], "quantize": quantize}
    train_task(TaskSettings(**values(wide, tmp_path, **common, steps=100, learning_rate=5e-3, rank=8)))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["base"]["quantization"]["format"] == quantize
    merge([tmp_path / "out"], weights=[1.0], out=tmp_path / "merged")
    asked = EvaluateSettings(
        base=str(wide),
        adapter=str(tmp_path / "merged"),
        task="slots",
        data=common["train"],
        max_new_tokens=6,
        dtype="float32",
        device="cpu",
        quantize=quantize,
    )
    assert evaluate(asked).scores["en"].value == 1.0


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_a_pass_without_gradients_leaves_codes_and_scales_alone(quantize: str, wide: Path) -> None:
    """On processors with bfloat16 bitsandbytes would rewrite them; others have nothing to keep."""
    pytest.importorskip("bitsandbytes")
    model = load_base(str(wide), device="cpu", dtype="bfloat16", quantize=quantize).model
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    before = [(layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = model(tokens).logits
    for layer, (codes, scales) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(layer.weight.quant_state.absmax, scales)
    states = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=states).logits
    logits.float().sum().backward()
    assert torch.allclose(logits, plain, atol=1e-2)
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("head", [None, "classes"])
def test_an_encoder_whose_checkpoint_has_no_pooler_runs(quantize: str, head: str | None, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_encoder(tmp_path / "bare", hidden=64)
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    asked = Head(form=HEAD_FORMS[head], labels=("a", "b")) if head else None
    base = load_base(str(tmp_path / "bare"), device="cpu", dtype="float32", quantize=quantize, head=asked)
    output = base.model(torch.arange(3, 9)[None])[0]
    assert torch.isfinite(output).all()
    assert type(base.model.base_model.encoder.layer[0].output.dense).__name__ in ("Linear4bit", "Linear8bitLt")


def test_rows_that_bitsandbytes_reads_wrongly_are_refused(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on some processors where rows are no whole blocks."""
    functional = pytest.importorskip("bitsandbytes.functional")
    load_base(str(wide), device="cpu", dtype="float32", quantize="nf4")
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given, **named: right(*given, **named) * 1.5)
    with refuses("quantize.processor: 64"):
        load_base(str(wide), device="cpu", dtype="float32", quantize="nf4")


def test_bitsandbytes_is_asked_for(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adaptermix.models.quantization as module

    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with refuses("quantize.no-bitsandbytes: nf4"):
        load_base(str(causal), device="cpu", quantize="nf4")
