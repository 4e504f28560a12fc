"""Adapters of every kind act on a live model as they do under PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix.adapters import open_adapter
from adaptermix.merging.on_model import acting
from adaptermix.models.base import BaseModel, load_base

from ..factories import CONFIG, WEIGHTS, peft_noise
from ..refusals import refuses
from ..tiny import tiny_causal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of tied weights


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    from transformers import AutoModelForCausalLM

    folder = tiny_causal(tmp_path_factory.mktemp("base"), "qwen2", layers=2)
    if request.param:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
    return load_base(str(folder), device="cpu")


def save(base: BaseModel, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a random adapter that PEFT made."""
    from peft import LoraConfig, get_peft_model

    with peft_noise():
        live = get_peft_model(copy.deepcopy(base.model), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in live.parameters():
                if value.requires_grad:
                    value.add_(torch.randn(value.shape, generator=generator) * 0.2)
        live.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits
    return found


def by_peft(base: BaseModel, folder: Path) -> Tensor:
    from peft import PeftModel

    with peft_noise():
        return logits(PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval())


KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all-biases": {"target_modules": ["q_proj"], "bias": "all"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_acts_as_under_peft(base: BaseModel, tmp_path: Path, kind: str) -> None:
    folder = save(base, tmp_path / "a", **KINDS[kind])
    plain, expected = logits(base.model), by_peft(base, folder)
    assert (expected - plain).abs().max() > 0.001
    with acting(base, [open_adapter(folder)]):
        torch.testing.assert_close(logits(base.model), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("kind", ["dora", "biases", "embeddings"])
@pytest.mark.parametrize("where", ["wrapped", "inside"])
def test_paths_of_another_class_or_wrapper_change_nothing(
    base: BaseModel, tmp_path: Path, kind: str, where: str
) -> None:
    folder = save(base, tmp_path / "a", **KINDS[kind])
    other = tmp_path / "other"
    other.mkdir()
    old, new = {"wrapped": ("model.model.", "model._orig_mod.model."), "inside": ("model.model.", "model.")}[where]
    tensors = {key.replace(f"base_{old}", f"base_{new}"): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS)
    (other / CONFIG).write_text((folder / CONFIG).read_text())
    expected = by_peft(base, folder)
    with acting(base, [open_adapter(other)]):
        torch.testing.assert_close(logits(base.model), expected, rtol=0, atol=1e-5)


def test_trained_tokens_beside_another_adapter_are_refused_by_name(base: BaseModel, tmp_path: Path) -> None:
    one = save(base, tmp_path / "one", **KINDS["tokens"])
    two = save(base, tmp_path / "two", target_modules=["q_proj"])
    with (
        refuses("adapter.tokens-alone: one"),
        acting(base, [open_adapter(one), open_adapter(two)]),
    ):
        pass
