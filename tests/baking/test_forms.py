"""`bake` onto and into every quantised form: bases in 4 and 8 bits, LoRAs beside them, GPT-2's layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("bitsandbytes")

from adaptermix import BakeSettings, bake
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.io.files import partial_path
from adaptermix.models.base import load_base
from adaptermix.models.formats import FORMATS
from adaptermix.models.formats.checkpoint import QuantizedCheckpoint, as_whole
from adaptermix.models.quantization import keep_codes
from tests.baking.test_bake import FEW, adapter, load, logits
from tests.factories import contents, peft_lora, peft_noise

from ..refusals import refuses

FORMS = ["nf4", "fp4", "int8"]


def quantised_by_transformers(base: Path, folder: Path, kind: str) -> Path:
    """Write a base as transformers writes it in 4 or 8 bits."""
    loaded = load_base(str(base), device="cpu", dtype="float32", quantize=kind)
    keep_codes(loaded.model)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def settings(base: Path, one: Path, out: Path, **more: Any) -> BakeSettings:
    common = {"base": str(base), "adapter": [str(one)], "out": str(out), "device": "cpu", "allow_base_mismatch": True}
    return BakeSettings(**{**common, **more})


@pytest.mark.parametrize("kind", FORMS)
def test_a_quantised_base_reads_as_what_its_codes_stand_for(kind: str, wide: Path, tmp_path: Path) -> None:
    found = as_whole(open_checkpoint(quantised_by_transformers(wide, tmp_path / "base", kind)))
    assert isinstance(found, QuantizedCheckpoint)
    assert found.format == kind
    before = open_checkpoint(wide)
    assert {name: header.shape for name, header in found.tensors.items()} == {
        name: header.shape for name, header in before.tensors.items()
    }
    for name in found.readers:
        wanted = FORMATS[kind](before.load(name).float())
        torch.testing.assert_close(found.load(name).float(), wanted.weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("strategy", ["requantize", "calibrated", "residual", "auto", "dequant-16"])
def test_from_a_quantised_base_it_is_as_from_the_whole_one(
    kind: str, strategy: str, wide: Path, texts: str, tmp_path: Path
) -> None:
    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.5)
    base = quantised_by_transformers(wide, tmp_path / "base", kind)
    more: dict[str, Any] = {"quantize": kind, "strategy": strategy, "calibration": [texts], "keep_at_least": 0.0}
    bake(settings(wide, one, tmp_path / "from-whole", **more, dtype="float32"))
    report = bake(settings(base, one, tmp_path / "out", **more))
    model = load(tmp_path / "out", dtype=torch.float32)
    keep_codes(model)
    assert report.overall.kept > (0.5 if strategy in ("calibrated", "residual") else 0.0)
    if strategy in ("dequant-16", "requantize"):
        # what is known of inputs differs a little, as one model reads the texts in whole precision
        other = load(tmp_path / "from-whole", dtype=torch.float32)
        keep_codes(other)
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (strategy != "dequant-16")


@pytest.mark.parametrize("kind", FORMS)
def test_a_lora_beside_the_codes_loads_with_peft_and_repays_them(
    kind: str, wide: Path, texts: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.001)
    out = tmp_path / "out"
    report = bake(settings(wide, one, out, quantize=kind, strategy="residual", calibration=[texts]))
    assert all(module.fidelity.kept >= 0.95 for module in report.modules.values())
    ranks = [module.rank for module in report.modules.values() if module.rank is not None]
    assert ranks
    assert max(ranks) <= 4
    stored = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert report.bytes == pytest.approx(stored, rel=0.2)  # headers of many small tensors
    model = load(out, dtype=torch.float32)
    keep_codes(model)
    with peft_noise():
        repaid = PeftModel.from_pretrained(model, str(out / "residual")).eval()
        found = logits(repaid)
        # the codes' own base, and the adapter on it
        plain = load_base(str(wide), device="cpu", dtype="float32", quantize=kind).model.eval()
        keep_codes(plain)
        without = logits(plain)
        intended = logits(PeftModel.from_pretrained(plain, str(one)).eval()) - without
    if kind != "int8":  # its passes round activations too, by more than this adapter does
        assert float((found - without - intended).norm() / intended.norm()) < 0.6


def test_conv1d_layers_are_quantised_the_right_way_round(texts: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tiny import tiny_causal

    base = tiny_causal(tmp_path / "tokenizer", hidden=64)
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=json.loads((base / "config.json").read_text())["vocab_size"]
    )
    for file in base.glob("tokenizer*"):
        (tmp_path / "gpt2").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    one = peft_lora(
        tmp_path / "gpt2", tmp_path / "one", r=4, lora_alpha=0.5, target_modules=["c_attn"], fan_in_fan_out=True
    )
    more: dict[str, Any] = {"quantize": "nf4", "calibration": [texts], "keep_at_least": 0.0}
    report = bake(settings(tmp_path / "gpt2", one, tmp_path / "out", strategy="calibrated", **more))
    assert report.overall.kept > 0.5
    model = load(tmp_path / "out", dtype=torch.float32)
    keep_codes(model)
    bake(settings(tmp_path / "gpt2", one, tmp_path / "16", strategy="dequant-16", **more))
    whole = load(tmp_path / "16", dtype=torch.float32)
    # of all layers, those without an adapter are the same, and those with one nearly
    assert float((logits(model) - logits(whole)).norm() / logits(whole).norm()) < 0.1


def test_an_interrupted_bake_goes_on(wide: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptermix.baking import tensor_writer as work

    one = adapter(wide, tmp_path / "one", alpha=0.05)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "residual", "calibration": [texts], "keep_at_least": 0.5}
    bake(settings(wide, one, tmp_path / "whole", **more))
    made: list[str] = []
    finish = work.TensorWriter._finish

    def counting(self: Any, name: str) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(name)
        return finish(self, name)

    monkeypatch.setattr(work.TensorWriter, "_finish", counting)
    with pytest.raises(KeyboardInterrupt):
        bake(settings(wide, one, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()
    first = list(made)
    made.clear()
    monkeypatch.setattr(work.TensorWriter, "_finish", lambda self, name: made.append(name) or finish(self, name))
    report = bake(settings(wide, one, tmp_path / "out", **more))
    assert not set(made) & set(first)
    assert len(made) + len(first) == len(report.modules)
    assert not partial_path(tmp_path / "out").exists()
    one_way, other = contents(tmp_path / "whole"), contents(tmp_path / "out")
    for name in ("model.safetensors", "residual/adapter_model.safetensors"):
        assert one_way[name] == other[name]


def test_what_was_worked_out_is_not_lost_when_it_is_refused(
    wide: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.baking import tensor_writer as work

    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.02)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "calibrated", "calibration": [texts]}
    with refuses("bake.effect-lost: keep"):
        bake(settings(wide, one, tmp_path / "out", **more, keep_at_least=1.0))
    monkeypatch.setattr(work.TensorWriter, "_finish", None)
    report = bake(settings(wide, one, tmp_path / "out", **more, keep_at_least=0.0))
    assert report.overall.kept > 0.1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantize": "none"}, "bake.format: nf4"),
        ({"quantize": "fp4", "strategy": "requantize"}, "bake.format: nf4"),
        ({"quantize": "nf4", "strategy": "merge-16"}, "bake.merge-16"),
    ],
)
def test_a_quantised_base_is_taken_as_it_is_or_not_at_all(
    more: dict[str, Any], words: str, wide: Path, tmp_path: Path
) -> None:
    one = adapter(wide, tmp_path / "one")
    base = quantised_by_transformers(wide, tmp_path / "base", "nf4")
    with refuses(words):
        bake(settings(base, one, tmp_path / "out", **more))


def test_an_adapter_is_not_written_onto_weights_that_it_has_not_seen(wide: Path, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one")
    quantiser = {"format": "nf4", "block_size": 64, "double": True}
    document = {"kind": "task", "base": {"id": str(wide), "quantization": quantiser}}
    (one / "adaptermix.json").write_text(json.dumps(document))
    common: dict[str, Any] = {"allow_base_mismatch": False, "keep_at_least": 0.0}
    with refuses("bake.quantiser: trained on a base of format nf4"):
        bake(settings(wide, one, tmp_path / "out", **common))
    with refuses("bake.quantiser: trained on a base of format nf4"):
        bake(settings(wide, one, tmp_path / "out", quantize="fp4", strategy="requantize", **common))
    bake(settings(wide, one, tmp_path / "on-purpose", strategy="merge-16", **common))
    bake(settings(wide, one, tmp_path / "as-trained", quantize="nf4", strategy="dequant-16", **common))


@pytest.mark.parametrize(("strategy", "quantize"), [("residual", "nf4"), ("merge-16", "none")])
@pytest.mark.parametrize("dry", [True, False])
def test_a_task_is_scored_on_the_result_and_on_the_unmerged_adapters(
    strategy: str, quantize: str, dry: bool, wide: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptermix.baking import dev_score as task
    from tests.training.data import write_slots

    one, two = (
        adapter(wide, tmp_path / "one", targets=FEW, alpha=0.01),
        adapter(wide, tmp_path / "two", seed=2, targets=FEW, alpha=0.01),
    )
    scored: list[Any] = []
    evaluate = task.evaluate

    def watched(settings: Any, **more: Any) -> Any:
        found = evaluate(settings, **more)
        beside = settings.adapter and sorted(path.name for path in Path(settings.adapter).iterdir())
        scored.append((settings.base, settings.quantize, beside, found.overall.value))
        return found

    monkeypatch.setattr(task, "evaluate", watched)
    more: dict[str, Any] = {"quantize": quantize, "strategy": strategy, "task": "slots", "dev": [write_slots(tmp_path)]}
    more |= {"adapter": [str(one), str(two)], "max_new_tokens": 4, "dry_run": dry}
    more |= {"calibration": [texts]} if quantize != "none" else {}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    (base, form, beside, first), (baked, plain, repaid, second) = scored
    assert (base, form, plain) == (str(wide), quantize, "none")
    assert "adapter_model.safetensors" in beside
    assert (repaid is not None) == (strategy == "residual")
    assert baked != str(wide)
    assert report.task == {"unmerged": first, "baked": second}
    assert (tmp_path / "out").exists() != dry


def test_texts_that_were_test_data_are_refused(wide: Path, texts: str, tmp_path: Path) -> None:
    from adaptermix.progress import SILENT
    from adaptermix.tasks.data import find_files
    from adaptermix.tasks.splits import add_to_record

    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.5)
    add_to_record(find_files([texts]), task="slots", adapter="a", watch=SILENT)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "calibrated", "calibration": [texts], "keep_at_least": 0.0}
    with refuses("split.tested: --allow-tested"):
        bake(settings(wide, one, tmp_path / "out", **more))
    bake(settings(wide, one, tmp_path / "out", allow_tested=True, **more))
    assert json.loads((tmp_path / "out" / "adaptermix.json").read_text())["tested"]


def test_the_base_is_rounded_from_the_dtype_that_the_adapter_was_trained_in(wide: Path, tmp_path: Path) -> None:
    """Codes of a float32 checkpoint depend on whether it is loaded in bfloat16 first, as training does."""
    one = adapter(wide, tmp_path / "one", alpha=4)
    quantiser = {"format": "nf4", "block_size": 64, "double": True}
    document = {"kind": "task", "base": {"id": str(wide), "dtype": "bfloat16", "quantization": quantiser}}
    (one / "adaptermix.json").write_text(json.dumps(document))
    common: dict[str, Any] = {"allow_base_mismatch": False, "quantize": "nf4", "strategy": "dequant-16"}
    bake(settings(wide, one, tmp_path / "out", **common))
    trained = load_base(str(wide), device="cpu", dtype="bfloat16", quantize="nf4").model
    found = open_checkpoint(tmp_path / "out")
    from bitsandbytes.functional import dequantize_4bit

    from adaptermix.adapters import open_adapter

    for path, update in open_adapter(one).read().updates.items():
        weight = trained.get_submodule(path).weight
        state = weight.quant_state
        state.dtype = torch.float32
        wanted = dequantize_4bit(weight.data, state) + update.dense()
        torch.testing.assert_close(found.load(f"{path}.weight"), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_output_layer_stays_whole_and_gets_its_delta(wide: Path, texts: str, tmp_path: Path) -> None:
    one = peft_lora(wide, tmp_path / "one", r=4, lora_alpha=4, target_modules=["q_proj", "lm_head"])
    factors = load_file(one / "adapter_model.safetensors")  # PEFT saves a copy of the output layer too
    save_file({k: v for k, v in factors.items() if ".lora_" in k}, one / "adapter_model.safetensors")
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "auto", "calibration": [texts]}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    assert report.modules["lm_head"].strategy == "merge-16"
    from adaptermix.adapters import open_adapter

    delta = open_adapter(one).read().updates["lm_head"].dense()
    before, after = (
        open_checkpoint(wide).load("lm_head.weight"),
        open_checkpoint(tmp_path / "out").load("lm_head.weight"),
    )
    torch.testing.assert_close(after - before, delta, rtol=1e-3, atol=1e-5)
    load(tmp_path / "out")
    bake(settings(wide, one, tmp_path / "16", strategy="merge-16", calibration=[texts]))


def test_a_bake_leaves_the_unfinished_work_of_other_commands_alone(wide: Path, texts: str, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.5)
    training = partial_path(tmp_path / "out")
    training.mkdir()
    (training / "checkpoint").write_text("steps")
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "calibrated", "calibration": [texts], "keep_at_least": 0.0}
    bake(settings(wide, one, tmp_path / "out", **more))
    assert (training / "checkpoint").read_text() == "steps"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == [training.name]


def test_the_manifest_tells_the_quantiser_of_the_base_that_was_read(wide: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    loaded = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(wide).save_pretrained(tmp_path / "base")
    one = adapter(wide, tmp_path / "one", alpha=0.5)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "requantize", "keep_at_least": 0.0}
    bake(settings(tmp_path / "base", one, tmp_path / "out", **more))
    document = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert document["quantization"] == {"format": "nf4", "block_size": 64, "double": False}
    assert load_base(str(tmp_path / "out"), device="cpu").quantized == "nf4"


def test_a_dev_score_is_not_of_rows_that_codes_were_fitted_to(wide: Path, tmp_path: Path) -> None:
    from tests.training.data import write_slots

    one = adapter(wide, tmp_path / "one", alpha=0.5)
    rows = write_slots(tmp_path)
    Path(rows).write_text(
        "".join(line.replace("go", f"go {n}") + "\n" for n in range(9) for line in Path(rows).read_text().splitlines())
    )
    more: dict[str, Any] = {"quantize": "nf4", "calibration": [rows], "task": "slots", "dev": [rows]}
    with refuses("bake.dev-in-calibration: 54 of 54 rows of.*train"):
        bake(settings(wide, one, tmp_path / "out", **more))
