"""`bake` on tiny models: what is written loads elsewhere and is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix import BakeSettings, bake, merge
from adaptermix.adapters import open_adapter
from adaptermix.baking.fidelity import fidelity
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.models.formats import FORMATS
from adaptermix.models.quantization import keep_codes
from tests.factories import contents, load_base, peft_kind, peft_lora
from tests.tiny import tiny_causal, tiny_encoder

from ..refusals import refuses

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW = ["q_proj", "down_proj"]
"""Enough where codes are chosen for each module, which takes long."""
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(3, 27).reshape(2, 12)


def adapter(base: Path, folder: Path, seed: int = 1, targets: list[str] = ALL, **more: Any) -> Path:
    return peft_lora(base, folder, seed=seed, r=4, lora_alpha=more.pop("alpha", 1), target_modules=targets, **more)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_without_4_bits_it_is_the_sum_rounded_once(causal: Path, tmp_path: Path) -> None:
    one, two = adapter(causal, tmp_path / "one"), adapter(causal, tmp_path / "two", seed=2)
    report = bake(BakeSettings(base=str(causal), adapter=[str(one), str(two)], out=str(tmp_path / "out"), device="cpu"))
    merge([one, two], weights=[1.0, 1.0], form="dense", base=str(causal), out=tmp_path / "merged", device="cpu")
    baked, merged = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "merged")
    assert list(baked.tensors) == list(merged.tensors)
    assert all(torch.equal(baked.load(name), merged.load(name)) for name in baked.tensors)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "merged")))
    assert report.overall.kept == pytest.approx(1.0, abs=1e-3)
    assert report.strategy == "merge-16"
    assert report.bytes == sum(header.size for header in open_checkpoint(causal).tensors.values())
    files = contents(tmp_path / "out")
    bake(BakeSettings(base=str(causal), adapter=[str(one), str(two)], out=str(tmp_path / "again"), device="cpu"))
    assert contents(tmp_path / "again")["model.safetensors"] == files["model.safetensors"]


def test_shards_are_small_and_load(causal: Path, tmp_path: Path) -> None:
    one = adapter(causal, tmp_path / "one")
    common = {"base": str(causal), "adapter": [str(one)], "device": "cpu"}
    bake(BakeSettings(out=str(tmp_path / "whole"), **common))
    bake(BakeSettings(out=str(tmp_path / "parts"), shard_size="40KB", **common))
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 50_000 for path in files)
    torch.testing.assert_close(logits(load(tmp_path / "parts")), logits(load(tmp_path / "whole")))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("strategy", ["requantize", "stochastic", "calibrated", "auto"])
def test_a_checkpoint_in_4_bits_loads_with_bitsandbytes_and_is_what_was_measured(
    kind: str, strategy: str, wide: Path, texts: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    one = adapter(wide, tmp_path / "one")
    report = bake(
        BakeSettings(
            base=str(wide),
            adapter=[str(one)],
            quantize=kind,  # type: ignore[arg-type]
            strategy=strategy,  # type: ignore[arg-type]
            calibration=[texts],
            keep_at_least=0.9 if strategy == "auto" else 0.0,
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    if strategy == "auto":
        assert all(module.fidelity.kept >= 0.9 for module in report.modules.values())
        assert all(module.fidelity.error <= 0.5 for module in report.modules.values())
    model = load(tmp_path / "out", dtype=torch.float32)
    keep_codes(model)  # some processors round scales to bfloat16 at the first pass
    in_memory = load(wide, dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path / "out")
    linear = [name for name, module in in_memory.named_modules() if type(module) is torch.nn.Linear]
    left = 0
    with torch.no_grad():
        for name in linear:
            module = model.get_submodule(name)
            if not hasattr(module.weight, "quant_state"):
                left += name != "lm_head"
                in_memory.get_submodule(name).weight.copy_(module.weight)
                continue
            from bitsandbytes.functional import dequantize_4bit

            in_memory.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
            assert f"{name}.weight.quant_state.bitsandbytes__{kind}" in checkpoint.tensors
    assert left == report.counts().get("dequant-16", 0)
    torch.testing.assert_close(logits(model), logits(in_memory), rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == kind
    stored = (tmp_path / "out" / "README.md").read_text()
    assert "Kept" in stored


def test_what_the_adapter_leaves_alone_has_the_codes_of_the_base(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    one = peft_lora(wide, tmp_path / "one", seed=1, r=2, lora_alpha=1, target_modules=["q_proj"])
    common = {"base": str(wide), "adapter": [str(one)], "quantize": "nf4", "device": "cpu"}
    bake(BakeSettings(strategy="requantize", keep_at_least=0, out=str(tmp_path / "out"), **common))  # type: ignore[arg-type]
    base, found = open_checkpoint(wide), open_checkpoint(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    packed = FORMATS["nf4"](base.load(name).float())
    from adaptermix.models.formats import pack

    assert torch.equal(found.load(name), pack(packed.codes))
    assert torch.equal(found.load("model.norm.weight"), base.load("model.norm.weight"))


def test_onto_dequantised_weights_it_is_the_model_that_the_adapter_was_trained_with(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    from adaptermix.models.base import load_base
    from tests.factories import peft_noise

    one = adapter(wide, tmp_path / "one", alpha=4)
    report = bake(
        BakeSettings(
            base=str(wide),
            adapter=[str(one)],
            quantize="nf4",
            strategy="dequant-16",
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    assert report.overall.kept == pytest.approx(1.0, abs=1e-3)
    base = load_base(str(wide), dtype="float32", device="cpu", quantize="nf4")
    with peft_noise():
        trained = PeftModel.from_pretrained(base.model, str(one)).eval()
    torch.testing.assert_close(
        logits(load(tmp_path / "out", dtype=torch.float32)), logits(trained), rtol=1e-3, atol=1e-3
    )


def test_an_encoders_biases_take_up_the_mean(texts: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny_encoder(tmp_path / "encoder", hidden=64)
    one = peft_lora(base, tmp_path / "one", r=4, lora_alpha=0.01, target_modules=["query", "value"], task_type=None)
    report = bake(
        BakeSettings(
            base=str(base),
            adapter=[str(one)],
            quantize="nf4",
            strategy="calibrated",
            calibration=[texts],
            keep_at_least=0.0,
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    moved = {
        name
        for name in before.tensors
        if name.endswith("bias") and not torch.equal(before.load(name), after.load(name))
    }
    assert moved == {f"{module.removeprefix('bert.')}.bias" for module in report.modules}
    from transformers import AutoModel

    AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantize": "nf4", "strategy": "requantize"}, r"bake.effect-lost: requantize.*0\.0"),
        ({"base": "nowhere"}, "base.unreachable"),
        ({"adapter": ["nowhere"]}, "adapter.not-folder: nowhere"),
    ],
)
def test_what_would_be_lost_is_refused_and_nothing_is_written(
    more: dict[str, Any], words: str, wide: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    one = adapter(wide, tmp_path / "one", alpha=0.002)
    given = {"base": str(wide), "adapter": [str(one)], "out": str(tmp_path / "out"), "device": "cpu"} | more
    before = sorted(tmp_path.iterdir())
    with refuses(words):
        bake(BakeSettings(**given))
    assert sorted(tmp_path.iterdir()) == before


def test_options_that_do_not_go_together_are_refused(wide: Path) -> None:

    with refuses("bake.no-calibration"):
        BakeSettings(base=str(wide), adapter=["a"], quantize="nf4", out="o")
    with refuses("bake.strategy-unquantized"):
        BakeSettings(base=str(wide), adapter=["a"], strategy="calibrated", out="o")
    with refuses("bake.dev-score"):
        BakeSettings(base=str(wide), adapter=["a"], task="slots", out="o")


def test_a_dry_run_tells_all_and_writes_nothing(wide: Path, texts: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    one = adapter(wide, tmp_path / "one")
    given = {"base": str(wide), "adapter": [str(one)], "quantize": "nf4", "strategy": "calibrated"}
    common = given | {"calibration": [texts], "keep_at_least": 0.0, "out": str(tmp_path / "out"), "device": "cpu"}
    dry = bake(BakeSettings(dry_run=True, **common))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    wet = bake(BakeSettings(**common))  # type: ignore[arg-type]
    told = dry.document()
    ways = told.pop("strategies")
    found = wet.document()
    assert found.pop("strategies").keys() == {"dequant-16"}
    assert told | {"out": None} == found | {"out": None}
    assert ways.keys() == {"requantize", "calibrated", "residual", "dequant-16", "keep"}
    names = ("kept", "error", "kept_rest", "error_rest", "bytes")
    assert ways["calibrated"] == {name: told[name] for name in names}
    # the state of a weight is text, whose digits differ
    assert ways["requantize"]["bytes"] == pytest.approx(ways["calibrated"]["bytes"], rel=1e-3)
    assert ways["calibrated"]["bytes"] <= ways["residual"]["bytes"] < ways["dequant-16"]["bytes"]
    assert ways["residual"]["kept"] >= 0.95
    assert ways["dequant-16"]["bytes"] == max(way["bytes"] for way in ways.values())
    kept = [module.fidelity.kept for module in wet.modules.values()]
    assert len(kept) == len(ALL) * 4
    with refuses("bake.effect-lost"):
        bake(BakeSettings(**common | {"keep_at_least": 1.0, "out": str(tmp_path / "other")}))  # type: ignore[arg-type]


def test_kept_apart_adapters_are_one_lora_and_no_code_is_touched(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    from adaptermix.models.base import load_base
    from tests.factories import peft_noise

    one, two = adapter(wide, tmp_path / "one", alpha=4), adapter(wide, tmp_path / "two", seed=2, alpha=2)
    report = bake(
        BakeSettings(
            base=str(wide),
            adapter=[str(one), str(two)],
            quantize="nf4",
            strategy="keep",
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    assert (report.overall.kept, report.overall.error) == (1.0, 0.0)
    assert report.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    base = load_base(str(wide), dtype="float32", device="cpu", quantize="nf4")
    with peft_noise():
        composed = PeftModel.from_pretrained(base.model, str(tmp_path / "out")).eval()
        found = logits(composed)
        plain = PeftModel.from_pretrained(composed.unload(), str(one), adapter_name="one").eval()
        plain.load_adapter(str(two), adapter_name="two")
        plain.base_model.set_adapter(["one", "two"])
        torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)


def test_the_size_of_an_adapter_that_is_kept_apart_includes_whole_tensors(tmp_path: Path) -> None:
    """PEFT stores a copy of the output head that it adapts."""
    base = tiny_causal(tmp_path / "base", "llama")
    one = peft_kind(load_base(base), tmp_path / "one", r=2, target_modules=["lm_head"])
    common: dict[str, Any] = {"base": str(base), "adapter": [str(one)], "strategy": "keep", "device": "cpu"}
    found = [bake(BakeSettings(**common, out=str(tmp_path / "out"), dry_run=dry)).bytes for dry in (True, False)]
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert found == [size, size]


def test_what_is_reported_is_what_the_files_hold(texts: str, tmp_path: Path) -> None:
    """Weights and biases as they are stored, on the texts that had no part in it."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from adaptermix.baking.activations import InputsOfModules, read_texts
    from adaptermix.merging.on_model import acting
    from adaptermix.models.base import load_base
    from adaptermix.progress import SILENT

    base = tiny_causal(tmp_path / "base", "qwen2", hidden=64)
    one = adapter(base, tmp_path / "one", alpha=0.05)
    common: dict[str, Any] = {"base": str(base), "adapter": [str(one)], "quantize": "nf4", "strategy": "calibrated"}
    settings = BakeSettings(calibration=[texts], keep_at_least=0.0, out=str(tmp_path / "out"), device="cpu", **common)
    report = bake(settings)
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    source = open_adapter(one)
    loaded = load_base(str(base), device="cpu")
    paths = {path: path for path in report.modules}
    with acting(loaded, [source]):
        inputs = InputsOfModules(loaded, read_texts([texts])[0], paths, SILENT)
        known = {path: inputs.of(path) for path in paths}
    shifted = 0
    for path, module in report.modules.items():
        name = f"{path}.weight"
        parts = {key.removeprefix(f"{path}."): after.load(key) for key in after.tensors if key.startswith(f"{name}.")}
        read = dequantize_4bit(after.load(name), QuantState.from_dict(parts, device=torch.device("cpu"))).float()
        realised = read - FORMATS["nf4"](before.load(name).float()).weight()
        bias = f"{path}.bias"
        shift = after.load(bias) - before.load(bias) if bias in after.tensors else None
        shifted += shift is not None and bool(shift.any())
        delta = source.read().updates[path].dense().float()
        held = known[path].measured  # type: ignore[union-attr]
        found = fidelity(delta, realised, held.moment, shift=shift, mean=held.mean)
        assert found.kept == pytest.approx(module.fidelity.kept, abs=1e-3), path
        assert found.error == pytest.approx(module.fidelity.error, abs=1e-3), path
    assert shifted
