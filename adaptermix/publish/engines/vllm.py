"""vLLM: a PEFT folder in one rank and one scale.

Read in vLLM 0.33: `lora/peft_helper.py` (scale, refusals), `config/lora.py` (ranks), `lora/layers` (`set_lora`).
"""

from __future__ import annotations

import math

from ...adapters.lora_config import LoraSettings
from .base import ENGINES, PeftFolder, PlainAdapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes; an adapter needs one of at least its rank."""


def vllm_limit(rank: int) -> int | None:
    """Return the least value of vLLM's --max-lora-rank for a rank; None if the rank is too large."""
    return next((most for most in VLLM_RANKS if most >= rank), None)


class Vllm(PeftFolder):
    """vLLM. It adapts embeddings for some model classes only, so `export` refuses them."""

    name = "vllm"
    largest_rank = VLLM_RANKS[-1]
    has_experts = True

    def scale(self, settings: LoraSettings, rank: int) -> float:
        return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)

    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        limit = vllm_limit(adapter.rank)
        return (f"vllm serve {{base}} --enable-lora --max-lora-rank {limit} --lora-modules adapter={{adapter}}",)


ENGINES["vllm"] = Vllm()
