"""Likelihoods of continuations against one pass per continuation, and what a batch is told."""

from __future__ import annotations

import pytest
import torch

from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.likelihood import log_likelihoods

from .tiny import tiny_causal

PROMPTS = ["ab", "a much longer prompt", "x"]
ENDINGS = [["1", "2", "12"], ["long ending", "long endings", "no"], ["1", "2", "3"]]


@pytest.fixture(scope="module", params=["llama", "gemma3", "mamba"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tiny_causal(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_base(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_is_the_sum_over_its_tokens_alone(base: BaseModel, batch_size: int) -> None:
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    endings = [[base.tokenizer(text)["input_ids"] for text in texts] for texts in ENDINGS]
    passes: list[int] = []
    found = log_likelihoods(base, prompts, endings, batch_size=batch_size, before=passes.extend)
    # Endings of one token share the pass of their prompt; of the others "long ending" and "long endings" differ.
    assert sorted(passes) == [0, 0, 1, 1, 1, 2]
    for prompt, options, scores in zip(prompts, endings, found, strict=True):
        for ending, score in zip(options, scores, strict=True):
            with torch.no_grad():
                logs = base.model(torch.tensor([prompt + ending])).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(prompt) - 1 + n, token]) for n, token in enumerate(ending))
            assert score == pytest.approx(expected, abs=1e-4)
