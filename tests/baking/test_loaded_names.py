"""Models whose files name their tensors in another way than the model that transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from adaptermix import BakeSettings, bake, merge
from adaptermix.adapters.base_weights import find_weight
from adaptermix.io.checkpoint_files import open_checkpoint
from tests.factories import peft_kind, wrap_with_peft

from ..refusals import refuses

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FIRST = {
    "gemma3": ("language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
    "qwen2_vl": ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
}
"""Name of one module in the file and in the model."""
TARGETS = {
    "gemma3": r".*(language_model|vision_tower).*\.(q_proj|v_proj)",
    "qwen2_vl": r".*(language_model.*\.(q_proj|v_proj)|visual.*\.qkv)",
}


def seeing(kind: str) -> Any:
    """Return a tiny vision-language model."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    torch.manual_seed(0)
    if kind == "gemma3":
        image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62}
        config = Gemma3Config(
            text_config={**TEXT, "head_dim": 8},
            vision_config={**image, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            **ids,
        )
        return Gemma3ForConditionalGeneration(config).eval()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    image = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=image, image_token_id=62)
    ).eval()


@pytest.mark.parametrize("kind", FIRST)
def test_an_adapter_is_baked_into_the_model_it_was_trained_on(kind: str, tmp_path: Path) -> None:
    """As peft merges it, the image tower included; the output has the names of the base's files."""
    model = seeing(kind)
    model.save_pretrained(tmp_path / "base")
    in_file, in_model = FIRST[kind]
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert f"{in_file}.weight" in names
    assert f"{in_model}.weight" not in names
    one = peft_kind(seeing(kind), tmp_path / "one", r=4, target_modules=TARGETS[kind])
    report = bake(
        BakeSettings(
            base=str(tmp_path / "base"),
            adapter=[str(one)],
            out=str(tmp_path / "out"),
            device="cpu",
            allow_base_mismatch=True,
        )
    )
    assert in_model in report.modules
    assert any("vis" in path for path in report.modules)
    wanted = wrap_with_peft(type(model).from_pretrained(tmp_path / "base"), one).merge_and_unload().state_dict()
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    before = model.state_dict()
    assert any(not torch.equal(before[name], found[name]) for name in found)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert open_checkpoint(tmp_path / "out").tensors.keys() == names
    merge([one], weights=[1.0], form="dense", base=str(tmp_path / "base"), out=tmp_path / "merged", device="cpu")
    merged = open_checkpoint(tmp_path / "merged")
    assert torch.equal(merged.load(f"{in_file}.weight"), open_checkpoint(tmp_path / "out").load(f"{in_file}.weight"))


def test_names_of_the_files_and_of_the_model_are_found_and_no_others(tmp_path: Path) -> None:
    seeing("gemma3").save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    in_file, in_model = FIRST["gemma3"]
    assert find_weight(checkpoint, in_file) == find_weight(checkpoint, in_model) == f"{in_file}.weight"
    with refuses("base.no-weight"):
        find_weight(checkpoint, in_model.replace("layers.0", "layers.2"))
    with refuses("base.no-weight"):
        find_weight(checkpoint, "model.vision_tower.layers.0.self_attn.q_proj")
