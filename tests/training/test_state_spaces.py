"""Models without attention, or with other blocks too: alignment in the middle, and targets that PEFT adapts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from adaptermix import AlignSettings, TaskSettings, train_align, train_task
from adaptermix.adapters import open_adapter
from adaptermix.models.base import load_base
from adaptermix.models.blocks import first_blocks
from tests.tiny import _save, tiny_causal

from ..refusals import refuses
from .data import write_pairs, write_slots
from .test_joint import values

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED: dict[str, Any] = COMMON | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "max_position_embeddings": 512,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba": (MambaConfig, MambaForCausalLM, COMMON | {"state_size": 4}),
    "falcon_h1": (FalconH1Config, FalconH1ForCausalLM, MIXED | {"mamba_d_ssm": 64}),
    "bamba": (BambaConfig, BambaForCausalLM, MIXED | {"attn_layer_indices": [1, 3]}),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, kind, more = KINDS[request.param]
    tokenizer = load_base(str(tiny_causal(tmp_path / "llama")), device="cpu").tokenizer
    _save(kind, config(vocab_size=len(tokenizer), **more), tokenizer, tmp_path / "base", 0)
    return tmp_path / "base"


def test_the_first_blocks_run_alone_and_the_model_is_whole_again(model: Path) -> None:
    base = load_base(str(model), device="cpu", dtype="float32")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        whole = base.model(ids, output_hidden_states=True, use_cache=False)
        with first_blocks(base.model, 2):
            assert base.model.config.num_hidden_layers == 2
            base.model(ids, use_cache=False)
        again = base.model(ids, output_hidden_states=True, use_cache=False)
    assert len(again.hidden_states) == len(whole.hidden_states)
    torch.testing.assert_close(again.logits, whole.logits)


def test_alignment_and_tasks_are_trained_with_the_default_targets(model: Path, tmp_path: Path) -> None:
    train_align(AlignSettings(**values(model, tmp_path, pairs=write_pairs(tmp_path), out=str(tmp_path / "a"))))
    train_task(
        TaskSettings(**values(model, tmp_path, task="slots", train=[write_slots(tmp_path)], out=str(tmp_path / "t")))
    )
    blocks = {name: {path.split(".layers.")[1][0] for path in open_adapter(tmp_path / name).modules} for name in "at"}
    assert blocks == {"a": {"0", "1"}, "t": {"0", "1", "2", "3"}}
    targets = json.loads((tmp_path / "t" / "adapter_config.json").read_text())["target_modules"]
    assert ("out_proj" in targets) == (json.loads((model / "config.json").read_text())["model_type"] == "bamba")


def test_a_target_that_peft_refuses_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny_causal(tmp_path / "mamba", "mamba")
    own: dict[str, Any] = {"task": "slots", "train": [write_slots(tmp_path)], "targets": ["out_proj"]}
    with refuses("train.targets: dt_proj, in_proj, x_proj.*out_proj"):
        train_task(TaskSettings(**values(model, tmp_path, **own)))
