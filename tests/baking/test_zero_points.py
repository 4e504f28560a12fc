"""GPTQ and AWQ models: read by the definition of their files, with numbers worked out by hand.

Neither package is needed or used here. AWQ is also compared with the converter of compressed-tensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import BakeSettings, EvaluateSettings, bake, evaluate, merge, spectrum
from adaptermix.adapters import open_adapter
from adaptermix.io.checkpoint_files import open_checkpoint
from adaptermix.models.base import load_base
from adaptermix.models.formats import Int4
from adaptermix.models.formats.checkpoint import QuantizedCheckpoint, as_whole
from adaptermix.models.head_forms import HEAD_FORMS, Head
from tests.baking.test_bake import adapter, load, logits
from tests.training.data import write_slots

from ..refusals import refuses

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
GROUP = 32


def word(codes: list[int]) -> int:
    """Return eight integers in one signed word, the first in the lowest bits."""
    number = sum(code << (4 * place) for place, code in enumerate(codes))
    return number - 2**32 if number >= 2**31 else number


def checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": config}))
    return as_whole(open_checkpoint(folder))


@pytest.mark.parametrize(("version", "offset"), [("gptq", 1), ("gptq_v2", 0), (None, 1)])
def test_gptq_by_hand(version: str | None, offset: int, tmp_path: Path) -> None:
    """Sixteen inputs in two groups, eight outputs; inputs are in the order of activations, so groups alternate."""
    # column o of the packed matrix holds inputs 0 to 7 of output o in its first word
    first, second = [word([(i + o) % 16 for i in range(8)]) for o in range(8)], [word([o] * 8) for o in range(8)]
    tensors = {
        "a.qweight": torch.tensor([first, second], dtype=torch.int32),
        "a.qzeros": torch.tensor([[word([7] * 8)], [word([0, 1, 2, 3, 4, 5, 6, 15])]], dtype=torch.int32),
        "a.scales": torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16),
        "a.g_idx": torch.tensor([0, 1] * 8, dtype=torch.int32),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "checkpoint_format": version}
    found = checkpoint(tmp_path / "m", tensors, {key: value for key, value in config.items() if value})
    assert list(found.tensors) == ["a.weight"]
    assert (found.tensors["a.weight"].shape, found.tensors["a.weight"].dtype) == ((8, 16), "F16")
    weight = found.load("a.weight")
    assert weight.dtype == torch.float16
    zeros = [7 + offset, 7 + offset]
    assert weight[0, 0].item() == 0.5 * (0 - zeros[0])
    assert weight[3, 2].item() == 0.5 * (5 - zeros[1])
    # input 1 is of group 1, where output 3 has the zero point 3
    assert weight[3, 1].item() == 2.0 * (4 - (3 + offset))
    assert weight[7, 1].item() == 2.0 * (8 - (15 + offset))
    # the second word: every input of output o has the integer o
    assert weight[5, 8].item() == 0.5 * (5 - (7 + offset))
    assert weight[5, 15].item() == 2.0 * (5 - (5 + offset))


def test_gptq_without_an_order_has_groups_of_neighbours(tmp_path: Path) -> None:
    tensors = {
        "a.qweight": torch.tensor([[word([1] * 8)] * 8, [word([1] * 8)] * 8], dtype=torch.int32),
        "a.qzeros": torch.full((2, 1), word([0] * 8), dtype=torch.int32),
        "a.scales": torch.tensor([[1.0] * 8, [3.0] * 8], dtype=torch.float16),
    }
    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    weight = checkpoint(tmp_path / "m", tensors, config).load("a.weight")
    assert weight[0].tolist() == [1.0] * 8 + [3.0] * 8


def test_awq_by_hand(tmp_path: Path) -> None:
    """Two inputs in one group each, eight outputs: a word holds the outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    rows = [[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]]
    zeros = [[0, 0, 1, 1, 2, 2, 3, 3], [8] * 8]
    tensors = {
        "a.qweight": torch.tensor([[word([row[o] for o in AWQ_ORDER])] for row in rows], dtype=torch.int32),
        "a.qzeros": torch.tensor([[word([row[o] for o in AWQ_ORDER])] for row in zeros], dtype=torch.int32),
        "a.scales": torch.tensor([[1.0] * 8, [0.25] * 8], dtype=torch.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 1, "version": "gemm", "zero_point": True}
    found = checkpoint(tmp_path / "m", tensors, config)
    assert found.tensors["a.weight"].shape == (8, 2)
    # AWQ subtracts the stored zero point as it is
    assert found.load("a.weight")[:, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert found.load("a.weight")[:, 1].tolist() == [1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_awq_is_as_compressed_tensors_converts_it(tmp_path: Path) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    random = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32)

    tensors = {"a.qweight": integers(64, 2), "a.qzeros": integers(2, 2), "a.scales": torch.rand(2, 16).half()}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    found = checkpoint(tmp_path / "m", tensors, config).load("a.weight")
    theirs = converters.AutoAWQConverter.from_autoawq_config(config).process(dict(tensors))
    steps = unpack_from_int32(theirs["a.weight_packed"], 4, (16, 64)).float()
    zeros = unpack_from_int32(theirs["a.weight_zero_point"], 4, (16, 2), packed_dim=0).float()
    scales = theirs["a.weight_scale"].float()
    wanted = (steps - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    assert torch.equal(found, wanted.half())


def quantised(base: Path, folder: Path, method: str) -> tuple[Path, dict[str, Tensor]]:
    """Write a model in GPTQ or AWQ, one word at a time, and return its folder and the weights that the codes mean."""
    shutil.copytree(base, folder)
    tensors, meant = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        out, into = tensor.shape
        blocks = tensor.view(out, -1, GROUP)
        low, high = blocks.amin(2), blocks.amax(2)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(1, 15)  # GPTQ's first version cannot store 0
        each = [part.repeat_interleave(GROUP, 1) for part in (scales, zeros)]
        codes = (tensor / each[0] + each[1]).round().clamp(0, 15)
        meant[name] = (codes - each[1]) * each[0]
        stem, codes, zeros = name.removesuffix("weight"), codes.int().tolist(), zeros.int().T.tolist()
        if method == "gptq":
            words = [[word(codes[o][i : i + 8]) for o in range(out)] for i in range(0, into, 8)]
            rows = [[word([zero - 1 for zero in row[o : o + 8]]) for o in range(0, out, 8)] for row in zeros]
        else:
            words = [[word([codes[o + k][i] for k in AWQ_ORDER]) for o in range(0, out, 8)] for i in range(into)]
            rows = [[word([row[o + k] for k in AWQ_ORDER]) for o in range(0, out, 8)] for row in zeros]
        tensors[f"{stem}qweight"] = torch.tensor(words, dtype=torch.int32)
        tensors[f"{stem}qzeros"] = torch.tensor(rows, dtype=torch.int32)
        tensors[f"{stem}scales"] = scales.T.contiguous().half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    more = {"checkpoint_format": "gptq"} if method == "gptq" else {"version": "gemm", "zero_point": True}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, **more}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    return folder, meant


METHODS = ["gptq", "awq"]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_used_as_its_dequantised_weights(method: str, wide: Path, tmp_path: Path) -> None:
    base, meant = quantised(wide, tmp_path / "base", method)
    view = as_whole(open_checkpoint(base))
    assert not isinstance(view, QuantizedCheckpoint)
    assert all(torch.equal(view.load(name), weight) for name, weight in meant.items())
    reference = load_base(str(wide), device="cpu", dtype="float32").model
    before = logits(reference)
    for name, weight in meant.items():
        reference.get_parameter(name).data.copy_(weight)
    loaded = load_base(str(base), device="cpu", dtype="float32")
    assert loaded.quantized == "none"
    torch.testing.assert_close(logits(loaded.model), logits(reference), rtol=0, atol=0)
    assert (logits(reference) - before).abs().max() > 1e-3
    asked: dict[str, Any] = {"base": str(base), "task": "slots", "data": [write_slots(tmp_path)]}
    evaluate(EvaluateSettings(**asked, device="cpu", dtype="float32", max_new_tokens=2))


def test_dtype_and_rounding_of_a_dequantised_model(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, meant = quantised(wide, tmp_path / "base", "gptq")
    half = load_base(str(base), device="cpu", dtype="bfloat16").model
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(half.get_parameter(name).data, meant[name].bfloat16())
    four = load_base(str(base), device="cpu", dtype="float32", quantize="nf4")
    layer = four.model.get_submodule(name.removesuffix(".weight"))
    assert (four.quantized, type(layer).__name__) == ("nf4", "Linear4bit")
    head = load_base(
        str(base), device="cpu", dtype="bfloat16", head=Head(form=HEAD_FORMS["classes"], labels=("a", "b", "c"))
    )
    assert head.model.config.num_labels == 3
    assert head.model.score.weight.shape == (3, 64)
    assert head.model.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_bake_writes_other_formats(method: str, quantize: str, wide: Path, texts: str, tmp_path: Path) -> None:
    base, meant = quantised(wide, tmp_path / "base", method)
    one = adapter(wide, tmp_path / "one", targets=["q_proj"], alpha=0.5)
    more: dict[str, Any] = {"keep_at_least": 0.0, "device": "cpu", "allow_base_mismatch": True}
    more |= {"calibration": [texts], "strategy": "calibrated"} if quantize != "none" else {}
    asked = {"base": str(base), "adapter": [str(one)], "quantize": quantize, "out": str(tmp_path / "out")}
    report = bake(BakeSettings(**asked, **more))
    assert report.overall.kept > 0.5
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    name = "model.layers.2.mlp.up_proj.weight"
    found = as_whole(open_checkpoint(tmp_path / "out"))
    if quantize == "none":
        assert config is None
        assert torch.equal(found.load(name), meant[name])
        changed = "model.layers.0.self_attn.q_proj"
        delta = open_adapter(one).read().updates[changed].dense()
        torch.testing.assert_close(found.load(f"{changed}.weight"), meant[f"{changed}.weight"] + delta)
        load(tmp_path / "out")
    else:
        assert config is not None
        assert config["quant_method"] == "compressed-tensors"
        assert torch.equal(found.load(name), Int4.of(meant[name]).weight())


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_read_is_refused_by_name(method: str, wide: Path, tmp_path: Path) -> None:
    base, _ = quantised(wide, tmp_path / "base", method)
    one = adapter(wide, tmp_path / "one", targets=["q_proj"])
    with refuses(f"quantized.whole: {method}"):
        merge([one], weights=[1.0], base=base, form="dense", out=tmp_path / "out", allow_base_mismatch=True)
    with refuses(f"quantized.whole: {method}"):
        spectrum(str(wide), str(base))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (base / "config.json").write_text(json.dumps(config))
    with refuses(f"quantized.format: {method}"):
        load_base(str(base), device="cpu")
    asked = {"base": str(base), "adapter": [str(one)], "out": str(tmp_path / "out"), "device": "cpu"}
    with refuses(f"quantized.format: {method}"):
        bake(BakeSettings(**asked, allow_base_mismatch=True))


def test_tensors_that_do_not_match_are_refused(wide: Path, tmp_path: Path) -> None:
    base, _ = quantised(wide, tmp_path / "base", "gptq")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.qzeros"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with refuses("quantized.affine-tensors: model.layers.0.self_attn.q_proj.qweight"):
        load_base(str(base), device="cpu")
