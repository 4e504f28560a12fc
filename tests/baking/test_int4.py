"""Four bits of compressed-tensors: codes and files by hand, and against the package that defines them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptermix import BakeSettings, EvaluateSettings, TaskSettings, bake, evaluate, train_task
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.models.base import load_base
from adaptermix.models.formats import FORMATS, Int4
from adaptermix.models.formats.checkpoint import QuantizedCheckpoint, as_whole
from adaptermix.models.formats.words import pack_words, unpack_words
from tests.baking.test_bake import ALL, FEW, adapter, logits
from tests.factories import peft_lora
from tests.tiny import tiny_causal, tiny_encoder
from tests.training.data import write_slots
from tests.training.test_joint import values

from ..refusals import refuses


def settings(base: Path, one: Path, out: Path, **more: Any) -> BakeSettings:
    common = {"base": str(base), "adapter": [str(one)], "out": str(out), "device": "cpu", "quantize": "int4"}
    return BakeSettings(**{**common, **more})


def written(base: Path, folder: Path, **more: Any) -> Path:
    """Bake a small adapter with the nearest codes, and return the folder."""
    one = adapter(base, folder.with_name(f"{folder.name}-adapter"), targets=FEW, alpha=0.1)
    bake(settings(base, one, folder, **{"strategy": "requantize", "keep_at_least": 0.0, **more}))
    return folder


def weight(rows: int = 48, columns: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def test_codes_scales_and_words_by_hand() -> None:
    row = torch.zeros(32)
    row[:9] = torch.tensor([7.5, -7.5, 0.4, 0.6, -1.2, 3.0, -6.9, 7.2, 1.0])
    found = Int4.of(row[None])
    # the largest magnitude over 7.5, so that -7.5 becomes -8 and 7.5 is clipped to 7
    assert found.scales.tolist() == [1.0]
    steps = [7, -8, 0, 1, -1, 3, -7, 7, 1]
    assert found.weight()[0, :9].tolist() == steps
    stored = found.stored("a.q_proj.weight")
    assert sorted(stored) == ["a.q_proj.weight_packed", "a.q_proj.weight_scale", "a.q_proj.weight_shape"]
    packed = stored["a.q_proj.weight_packed"]
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (1, 4))
    # 8 is added to a step, and the first of eight is in the lowest bits: 15, 0, 8, 9, 7, 11, 1, 15
    assert packed[0, 0].item() == 0xF1B7980F - 2**32
    assert packed[0, 1].item() == 0x88888889 - 2**32
    assert stored["a.q_proj.weight_shape"].tolist() == [1, 32]
    assert stored["a.q_proj.weight_scale"].tolist() == [[1.0]]


def test_words_of_rows_that_do_not_fill_them() -> None:
    codes = torch.arange(33).remainder(16).view(3, 11)
    words = pack_words(codes)
    assert words.shape == (3, 2)
    assert torch.equal(unpack_words(words)[:, :11], codes.to(torch.uint8))


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (576, 64), (96, 32), (128, 128)])
def test_groups_are_of_the_largest_size_that_divides_a_row(columns: int, group: int) -> None:
    found = Int4.of(weight(columns=columns))
    assert found.block == group
    assert found.stored("w.weight")["w.weight_scale"].shape == (48, columns // group)
    with refuses("quantized.int4-rows: 100"):
        Int4.of(weight(columns=100))


def test_a_group_of_zeros_stays_zero() -> None:
    found = Int4.of(torch.zeros(2, 64))
    assert found.weight().abs().max() == 0
    assert torch.isfinite(found.scales).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_stored_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    found = Int4.of(weight(dtype=dtype))
    changed = found.with_scales(found.scales * 1.03)
    assert changed.stored("w.weight")["w.weight_scale"].dtype == dtype
    assert torch.equal(changed.scales.to(dtype).float(), changed.scales)
    assert ((changed.scales / found.scales - 1.03).abs() < 0.01).all()
    again = changed.requantized(changed.weight())
    assert (again.block, again.dtype) == (found.block, dtype)


def test_rounding_again_keeps_scales_that_are_good_enough() -> None:
    row = torch.zeros(1, 64)
    row[0, :3] = torch.tensor([7.5, -7.5, 0.4])
    row[0, 32:34] = torch.tensor([7.5, 1.0])
    found = Int4.of(row, group=32)
    assert found.scales.tolist() == [1.0, 1.0]
    same = found.requantized(found.weight())
    assert torch.equal(same.codes, found.codes)
    assert torch.equal(same.scales, found.scales)
    delta = torch.zeros(1, 64)
    delta[0, 2], delta[0, 32] = 0.6, 8.0  # 0.6 is nearest to 1; 7 + 8 = 15 is out of reach of the scale 1
    moved = found.requantized(found.weight() + delta)
    assert moved.scales.tolist() == [1.0, 2.0]
    assert moved.weight()[0, :4].tolist() == [7, -8, 1, 0]
    # 15 / 2 = 7.5 is clipped to 7, and 1 / 2 rounds to 0, the even neighbour
    assert moved.weight()[0, 32:35].tolist() == [14, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 576])
def test_compressed_tensors_reads_what_is_stored(dtype: torch.dtype, columns: int) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    found = Int4.of(weight(columns=columns, dtype=dtype))
    found = found.with_codes(found.codes.flip(0)).with_scales(found.scales * 0.9)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=found.block)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    parts = {name.removeprefix("w."): tensor for name, tensor in found.stored("w.weight").items()}
    assert set(parts) == set(packer.compression_param_names(scheme))
    read = packer.decompress(parts, scheme)["weight"]
    assert read.dtype == dtype
    assert torch.equal(read, found.weight().to(dtype))
    if dtype == torch.float32:  # in half precision the package divides in half precision, too
        plain = Int4.of(weight(columns=columns))
        blocks = weight(columns=columns).view(48, -1, plain.block)
        scales, zeros = calculate_qparams(blocks.amin(2), blocks.amax(2), args)
        theirs = packer.compress({"weight": weight(columns=columns), "weight_scale": scales}, scheme)
        ours = plain.stored("w.weight")
        assert zeros.abs().max() == 0
        assert torch.equal(theirs["weight_packed"], ours["w.weight_packed"])
        assert torch.equal(theirs["weight_scale"], ours["w.weight_scale"])


@pytest.mark.parametrize("strategy", ["requantize", "stochastic", "calibrated", "residual", "auto"])
def test_transformers_loads_the_folder_as_what_was_measured(
    strategy: str, wide: Path, texts: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    one = adapter(wide, tmp_path / "one", targets=FEW)
    more: dict[str, Any] = {"strategy": strategy, "calibration": [texts], "keep_at_least": 0.0}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_base(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert ours.quantized == "int4"
    assert torch.equal(logits(theirs), logits(ours.model))
    if strategy == "requantize":
        before = open_checkpoint(wide)
        from adaptermix.adapters import open_adapter

        updates = open_adapter(one).read().updates
        for path in updates:
            tensor = before.load(f"{path}.weight")
            before_it = Int4.of(tensor)
            wanted = before_it.requantized(before_it.weight() + updates[path].dense()).weight()
            torch.testing.assert_close(ours.model.get_submodule(path).weight.data, wanted)
    if strategy in ("calibrated", "residual"):
        assert report.overall.kept > 0.5


def test_the_config_describes_what_engines_need(wide: Path, tmp_path: Path) -> None:
    config = json.loads((written(wide, tmp_path / "out") / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert "lm_head" in config["ignore"]
    groups = {group["weights"]["group_size"]: group["targets"] for group in config["config_groups"].values()}
    # rows of 64 and, for the second layer of an MLP, of 128
    assert groups[128] == [r"re:.*\.down_proj$"]
    assert r"re:.*\.q_proj$" in groups[64]
    stored = open_checkpoint(tmp_path / "out").tensors
    name = "model.layers.0.mlp.down_proj"
    assert stored[f"{name}.weight_packed"].shape == (64, 16)
    assert f"{name}.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == "F32"
    even = tiny_causal(tmp_path / "even", hidden=128)
    config = json.loads((written(even, tmp_path / "plain") / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_layers_whose_rows_do_not_divide_stay_in_16_bits_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adaptermix.cli import main

    base = tiny_causal(tmp_path / "odd", hidden=48)  # rows of 48, which no group divides, and of 96
    one = adapter(base, tmp_path / "one", targets=ALL)
    arguments = ["bake", "--base", base, "--adapter", one, "--quantize", "int4", "--strategy", "requantize"]
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments), "--keep-at-least", "0", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert done.value.code == 0
    told = capsys.readouterr().err
    assert "24 of 28 linear layers stay in 16 bits" in told
    assert "that 32 divides" in told
    assert "model.layers.0.self_attn.q_proj" in told
    stored = open_checkpoint(tmp_path / "out").tensors
    assert "model.layers.0.mlp.down_proj.weight_packed" in stored
    assert stored["model.layers.0.self_attn.q_proj.weight"].shape == (48, 48)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignored
    assert "model.layers.0.mlp.down_proj" not in ignored


def test_no_layer_that_fits_is_refused(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "odd", hidden=40)
    with refuses("bake.no-fitting-layer: int4"):
        bake(settings(base, adapter(base, tmp_path / "one"), tmp_path / "out", strategy="requantize"))


def test_layers_that_engines_join_are_all_quantised_or_all_whole(wide: Path, texts: str, tmp_path: Path) -> None:
    """vLLM refuses a model in which of `q_proj`, `k_proj` and `v_proj` only some are quantised."""
    one = peft_lora(wide, tmp_path / "one", r=4, lora_alpha=0.02, target_modules=["q_proj", "gate_proj", "down_proj"])
    more: dict[str, Any] = {"strategy": "auto", "calibration": [texts], "keep_at_least": 0.9}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    left = {path for path, module in report.modules.items() if module.strategy == "dequant-16"}
    assert any(path.endswith("q_proj") for path in left)
    stored = open_checkpoint(tmp_path / "out")
    quantised = {name.removesuffix(".weight_packed") for name in stored.tensors if name.endswith(".weight_packed")}
    assert quantised
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    for layer in range(4):
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent = f"model.layers.{layer}.{'mlp' if 'up_proj' in together else 'self_attn'}"
            assert len({f"{parent}.{name}" in quantised for name in together}) == 1
            # exactly the layers that are not quantised are listed
            assert all((f"{parent}.{name}" in quantised) != (f"{parent}.{name}" in ignored) for name in together)
            if f"{parent}.{together[0]}" in left:
                weight = open_checkpoint(wide).load(f"{parent}.{together[1]}.weight")
                assert torch.equal(stored.load(f"{parent}.{together[1]}.weight"), Int4.of(weight).weight())


def test_a_base_in_int4_keeps_its_codes_where_no_adapter_acts(wide: Path, tmp_path: Path) -> None:
    base = written(wide, tmp_path / "base")
    view = as_whole(open_checkpoint(base))
    assert isinstance(view, QuantizedCheckpoint)
    assert {name: header.shape for name, header in view.tensors.items()} == {
        name: header.shape for name, header in open_checkpoint(wide).tensors.items()
    }
    one = adapter(wide, tmp_path / "one", targets=["o_proj"], alpha=0.1)
    more: dict[str, Any] = {"strategy": "requantize", "keep_at_least": 0.0, "allow_base_mismatch": True}
    bake(settings(base, one, tmp_path / "out", **more))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".o_proj." in name for name in changed)
    bake(settings(base, one, tmp_path / "whole", **{**more, "strategy": "dequant-16"}))
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(open_checkpoint(tmp_path / "whole").load(name), view.load(name))


def test_training_and_evaluation_on_int4_weights(wide: Path, tmp_path: Path) -> None:
    rows = [{"text": f"go {number}", "slots": [{"type": "c", "value": "x"}]} for number in range(6)]
    (tmp_path / "same.en.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"task": "slots", "train": [str(tmp_path / "same.en.jsonl")], "quantize": "int4"}
    train_task(TaskSettings(**values(wide, tmp_path, **common, steps=100, learning_rate=5e-3, rank=8)))
    manifest = json.loads((tmp_path / "out" / "adaptermix.json").read_text())
    assert manifest["base"]["quantization"] == {"format": "int4"}
    model = load_base(str(wide), device="cpu", dtype="float32", quantize="int4").model
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(
        model.get_submodule(name).weight.data, Int4.of(open_checkpoint(wide).load(f"{name}.weight")).weight()
    )
    head = open_checkpoint(wide).load("lm_head.weight")
    assert torch.equal(model.lm_head.weight.data, head)
    asked: dict[str, Any] = {"task": "slots", "data": common["train"], "max_new_tokens": 6, "dtype": "float32"}
    asked |= {"adapter": str(tmp_path / "out"), "device": "cpu"}
    assert evaluate(EvaluateSettings(base=str(wide), quantize="int4", **asked)).scores["en"].value == 1.0
    # baked into the codes that it was trained with, as plain 16 bits
    more: dict[str, Any] = {"strategy": "dequant-16", "dtype": "float32"}
    bake(settings(wide, tmp_path / "out", tmp_path / "baked", **more))
    asked["adapter"] = None
    assert evaluate(EvaluateSettings(base=str(tmp_path / "baked"), **asked)).scores["en"].value == 1.0


def test_rounding_twice_changes_nothing_on_a_base_in_int4(wide: Path, tmp_path: Path) -> None:
    base = written(wide, tmp_path / "base")
    plain = load_base(str(base), device="cpu", dtype="float32").model
    again = load_base(str(base), device="cpu", dtype="float32", quantize="int4").model
    assert torch.equal(logits(plain), logits(again))


def test_a_dev_score_is_of_the_result(wide: Path, texts: str, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one", targets=FEW, alpha=0.01)
    more: dict[str, Any] = {"task": "slots", "dev": [write_slots(tmp_path)], "max_new_tokens": 4}
    more |= {"strategy": "residual", "calibration": [texts]}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    assert set(report.task or {}) == {"unmerged", "baked"}


def test_other_forms_of_compressed_tensors_are_refused_by_name(wide: Path, tmp_path: Path) -> None:
    base = written(wide, tmp_path / "base")
    one = adapter(wide, tmp_path / "one", alpha=0.1)
    config = json.loads((base / "config.json").read_text())
    for key, value in (("num_bits", 8), ("symmetric", False), ("actorder", "group"), ("type", "float")):
        other = json.loads(json.dumps(config))
        other["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
        (base / "config.json").write_text(json.dumps(other))
        with refuses("quantized.format: compressed-tensors"):
            bake(settings(base, one, tmp_path / "out", allow_base_mismatch=True, strategy="requantize"))
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(128, 3)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with refuses("quantized.int4-tensors: model.layers.0.mlp.up_proj.weight_packed"):
        load_base(str(base), device="cpu")


def test_int4_needs_no_package(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adaptermix.models.quantization as module

    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    base = written(wide, tmp_path / "base")
    shutil.rmtree(tmp_path / "base-adapter")
    assert load_base(str(base), device="cpu").quantized == "int4"
    assert FORMATS["int4"].package is None


def test_scales_in_half_precision_are_read_as_by_compressed_tensors(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = written(wide, tmp_path / "out", dtype="float16")
    assert open_checkpoint(out).tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == "F16"
    for name in ("float32", "float16"):
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, name)).eval()
        ours = load_base(str(out), device="cpu", dtype=name).model
        logits(theirs)  # the package dequantises at the first pass
        found = dict(ours.named_parameters())
        assert all(torch.equal(found[key], tensor) for key, tensor in theirs.named_parameters() if key in found)
        assert sum(key in found for key, _ in theirs.named_parameters()) == len(found)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base", "qwen2_moe", hidden=64)
    one = adapter(base, tmp_path / "one", targets=["q_proj"])
    with refuses("bake.experts: int4.*experts"):
        bake(settings(base, one, tmp_path / "out", strategy="requantize"))


@pytest.mark.parametrize("kind", ["encoder", "qwen2", "gemma3"])
def test_other_families_load_as_they_were_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModel, AutoModelForCausalLM

    if kind == "encoder":
        base, targets = tiny_encoder(tmp_path / "base", hidden=64), ["query", "value"]
    else:
        base, targets = tiny_causal(tmp_path / "base", kind, hidden=64), ["q_proj", "o_proj"]
    one = peft_lora(base, tmp_path / "one", r=4, lora_alpha=1, target_modules=targets)
    report = bake(settings(base, one, tmp_path / "out", strategy="requantize", keep_at_least=0.0))
    assert "requantize" in report.counts()
    auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_base(str(tmp_path / "out"), device="cpu", dtype="float32").model
    plain = load_base(str(base), device="cpu", dtype="float32").model
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        found, expected, whole = (model(input_ids=ids)[0] for model in (ours, theirs, plain))
    assert torch.equal(found, expected)
    assert not torch.equal(found, whole)


def test_a_dequantised_model_stops_where_its_files_say(wide: Path, tmp_path: Path) -> None:
    base = written(wide, tmp_path / "base")
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 77]}))
    assert load_base(str(base), device="cpu").model.generation_config.eos_token_id == [2, 77]
