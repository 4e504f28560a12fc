"""Baking where the base model's files have other names or fewer tensors than the class that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptermix import BakeSettings, bake, extract, merge

from ..adapters.test_paths import save, seeing
from ..factories import logits, peft_noise
from ..refusals import refuses

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied weights


def settings(base: Path, adapter: Path, out: Path, **more: Any) -> BakeSettings:
    return BakeSettings(
        base=str(base), adapter=[str(adapter)], out=str(out), allow_base_mismatch=True, device="cpu", **more
    )


def with_peft(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with peft_noise():
        return PeftModel.from_pretrained(model, adapter).eval()


def test_a_vision_language_model_takes_its_own_adapter(tmp_path: Path) -> None:
    from transformers import Gemma3ForConditionalGeneration as Model

    seeing().save_pretrained(tmp_path / "base")
    stored = set(load_file(tmp_path / "base" / "model.safetensors"))
    one = save(seeing(), tmp_path / "one", seed=1, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    bake(settings(tmp_path / "base", one, tmp_path / "out"))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == stored
    expected = with_peft(Model.from_pretrained(tmp_path / "base"), one).merge_and_unload().state_dict()
    found = Model.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_an_extracted_adapter_has_the_paths_of_the_class(tmp_path: Path) -> None:
    from transformers import Gemma3ForConditionalGeneration as Model

    seeing().save_pretrained(tmp_path / "base")
    tuned = seeing()
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "language_model" in name and "q_proj" in name:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "out", rank=32)
    found = with_peft(Model.from_pretrained(tmp_path / "base"), tmp_path / "out").merge_and_unload().state_dict()
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def llama(folder: Path, *, tied: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if not folder.exists():
        size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=tied, **size))
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("way", ["bake", "merge"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_lora_on_the_output_head_is_written_as_peft_has_it(tmp_path: Path, tied: bool, way: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    one = save(llama(base, tied=tied), tmp_path / "one", seed=1, target_modules=EVERY, task_type="CAUSAL_LM")
    assert any(name.endswith("lm_head.base_layer.weight") for name in load_file(one / "adapter_model.safetensors"))
    # Not merged by PEFT, which would add the head's delta to tied embeddings too.
    expected: Tensor = logits(with_peft(llama(base, tied=tied), one))
    if way == "bake":
        bake(settings(base, one, out))
    else:
        merge([one], weights=[1.0], base=str(base), form="dense", out=out, allow_base_mismatch=True)
    torch.testing.assert_close(logits(llama(out, tied=tied)), expected, rtol=0, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    tables = load_file(out / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert torch.equal(tables["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_copy_that_differs_from_the_base_is_still_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base"
    one = save(llama(base, tied=False), tmp_path / "one", seed=1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    stored = load_file(one / "adapter_model.safetensors")
    save_file(
        {name: value + 1 if "base_layer" in name else value for name, value in stored.items()},
        one / "adapter_model.safetensors",
    )
    with refuses("bake.not-deltas"):
        bake(settings(base, one, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
