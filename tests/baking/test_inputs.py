"""What is known of modules' inputs is what a plain pass over each text shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptermix.baking import activations
from adaptermix.baking.activations import InputsOfModules, split
from adaptermix.models.base import BaseModel, load_base
from adaptermix.progress import SILENT
from tests.tiny import tiny_causal, tiny_encoder

TEXTS = [" ".join(str((n * k) % 37) for k in range(1, 2 + n % 9)) for n in range(60)]


def read_alone(base: BaseModel, path: str, texts: list[str]) -> torch.Tensor:
    """Return a module's inputs, text by text, in float64."""
    rows: list[torch.Tensor] = []
    module = base.model.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda _, given: rows.append(given[0].reshape(-1, given[0].shape[-1])))
    with torch.inference_mode():
        for text in texts:
            base.model(**base.tokenizer([text], return_tensors="pt"))
    hook.remove()
    return torch.cat(rows).double()


def plainly(base: BaseModel, path: str, part: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return covariance, mean and count of a module's inputs; of the fitted part none counts more than a usual one."""
    parts = split(TEXTS)
    rows = read_alone(base, path, parts[part])
    weights = torch.ones(len(rows), dtype=torch.float64)
    if part == "fitted":
        usual = read_alone(base, path, sorted(parts["fitted"], key=len, reverse=True)[:16]).square().sum(1).median()
        weights = (usual / rows.square().sum(1)).clamp(max=1.0)
    return torch.cov(rows.T, correction=0, aweights=weights), weights @ rows / weights.sum(), len(rows)


def causal_of(kind: str, folder: Path, side: str) -> BaseModel:
    if kind == "bert":
        return load_base(str(tiny_encoder(folder)), device="cpu", dtype="float32")
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        tiny_causal(folder)
        size = load_base(str(folder), device="cpu").model.config.vocab_size
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=size)).save_pretrained(folder)
    else:
        tiny_causal(folder, kind)
    base = load_base(str(folder), device="cpu", dtype="float32")
    base.tokenizer.padding_side = side
    return base


PATHS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"],
    "qwen2_moe": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.shared_expert.up_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"],
    "bert": ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"],
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("memory", [1, 2**40])
def test_moments_are_those_of_each_text_alone(
    kind: str, side: str, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However texts are batched and padded, whatever modules are measured together, and where reading stops."""
    base = causal_of(kind, tmp_path / "model", side)
    monkeypatch.setattr(activations, "memory_for_moments", lambda _: memory)
    inputs = InputsOfModules(base, TEXTS, {path: path for path in PATHS[kind]}, SILENT)
    for path in PATHS[kind]:
        known: Any = inputs.of(path)
        for part in ("fitted", "chosen", "measured"):
            covariance, mean, count = plainly(base, path, part)
            found = getattr(known, part)
            assert found.count == count
            torch.testing.assert_close(found.mean.double(), mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.covariance.double(), covariance, rtol=1e-3, atol=1e-4)
    assert inputs.of("another") is None


def test_modules_that_read_the_same_share_what_is_known(tmp_path: Path) -> None:
    base = causal_of("llama", tmp_path / "model", "right")
    query, key, down = PATHS["llama"]
    inputs = InputsOfModules(base, TEXTS, {path: path for path in (query, key, down)}, SILENT)
    assert inputs.of(query) is inputs.of(key)
    assert inputs.of(down) is not inputs.of(key)
