"""Adapters in memory: the merge equals that of their files, and the result goes onto a loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

import adaptermix
from tests.refusals import refuses

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model(causal: Path) -> Any:
    """A model with two trained adapters of different ranks and scales."""
    base = AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    other = LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft = get_peft_model(base, config, adapter_name="default")
    peft.add_adapter("align", other)
    return peft


@pytest.fixture
def files(model: Any, tmp_path: Path) -> list[Path]:
    model.save_pretrained(str(tmp_path / "saved"))
    return [tmp_path / "saved", tmp_path / "saved" / "align"]


def inputs(kind: str, model: Any, files: list[Path]) -> list[Any]:
    names = ["default", "align"]
    if kind == "model":
        return [model, (model, "align")]
    if kind == "state dict":
        states = [get_peft_model_state_dict(model, adapter_name=name) for name in names]
        return [(state, model.peft_config[name]) for state, name in zip(states, names, strict=True)]
    if kind == "mapping":
        states = [get_peft_model_state_dict(model, adapter_name=name) for name in names]
        return [(state, model.peft_config[name].to_dict()) for state, name in zip(states, names, strict=True)]
    return [adaptermix.load_adapter(files[0]), files[1]]


@pytest.mark.parametrize("options", [{}, {"method": "ties", "options": {"density": 0.5}, "max_residual": 1.0}])
@pytest.mark.parametrize("kind", ["model", "state dict", "mapping"])
def test_a_merge_in_memory_equals_that_of_the_files_to_the_byte(
    kind: str, options: dict[str, Any], model: Any, files: list[Path], tmp_path: Path
) -> None:
    adaptermix.merge(files, weights=[1.0, 0.5], out=tmp_path / "files", **options)
    adaptermix.merge(inputs(kind, model, files), weights=[1.0, 0.5], out=tmp_path / "memory", **options)
    assert (tmp_path / "memory" / WEIGHTS).read_bytes() == (tmp_path / "files" / WEIGHTS).read_bytes()
    config, other = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("memory", "files"))
    assert config == other


def test_an_adapter_that_was_loaded_merges_as_its_folder(model: Any, files: list[Path]) -> None:
    in_files = adaptermix.merge(files, weights=[1.0, 0.5]).adapter
    in_memory = adaptermix.merge(inputs("state", model, files), weights=[1.0, 0.5]).adapter
    assert in_files is not None
    assert in_memory is not None
    assert in_files.updates.keys() == in_memory.updates.keys()
    for path, update in in_files.updates.items():
        torch.testing.assert_close(in_memory.updates[path].b @ in_memory.updates[path].a, update.b @ update.a)


def test_the_result_goes_onto_the_model(model: Any, files: list[Path], causal: Path, tmp_path: Path) -> None:
    report = adaptermix.merge([model, (model, "align")], weights=[1.0, 0.5])
    adaptermix.merge(files, weights=[1.0, 0.5], out=tmp_path / "out")
    tokens = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(tmp_path / "out"))(tokens).logits
    assert report.adapter is not None
    before = model.active_adapter
    assert adaptermix.add_to(model, report.adapter, "merged") is model
    assert model.active_adapter == before
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-4)
    model.set_adapter("merged")
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    wrapped = adaptermix.add_to(plain, report.adapter)
    torch.testing.assert_close(wrapped(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    with refuses("adapter.name-in-use: 'merged'"):
        adaptermix.add_to(model, report.adapter, "merged")


def test_a_merge_that_writes_keeps_no_adapter_in_memory(files: list[Path], tmp_path: Path) -> None:
    assert adaptermix.merge(files, weights=[1.0, 0.5], out=tmp_path / "out").adapter is None
    assert adaptermix.merge(files, weights=[1.0, 0.5], out=tmp_path / "dry", dry_run=True).adapter is None


def test_other_objects_are_refused(model: Any) -> None:
    for wrong, code in ((3, "adapter.object: int"), ((model, "absent"), "adapter.name: 'absent'")):
        with refuses(code):
            adaptermix.merge([wrong, model], weights=[0.5])
    with refuses("adapter.object-config: str"):
        adaptermix.merge([({}, "text")], weights=[1.0])
