"""TensorRT-LLM: a PEFT folder in one rank and one scale.

Read in TensorRT-LLM 1.2: `lora_manager.py` (`load_from_hf`, `get_default_trtllm_modules_to_hf_modules`, `LoraConfig`).
Its DoRA needs magnitudes that are divided by norms of the base weights, so DoRA is refused here.
"""

from __future__ import annotations

import math

from ...adapters.lora_config import LoraSettings
from .base import ENGINES, PeftFolder, PlainAdapter

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "gate_up_proj": "mlp_gate_up",
    "down_proj": "mlp_4h_to_h",
}
"""TensorRT-LLM's names of the modules that it adapts."""


class TensorRtLlm(PeftFolder):
    """TensorRT-LLM. It divides alpha by the rank of the stored factors."""

    name = "tensorrt-llm"
    modules = frozenset(_NAMES)

    def scale(self, settings: LoraSettings, rank: int) -> float:
        return settings.alpha / (math.sqrt(rank) if settings.rslora else rank)

    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        names = ", ".join(f'"{_NAMES[kind]}"' for kind in adapter.kinds)
        config = f'LoraConfig(lora_dir=["{{adapter}}"], max_lora_rank={adapter.rank}, lora_target_modules=[{names}])'
        return (f'llm = LLM(model="{{base}}", lora_config={config})',)


ENGINES["tensorrt-llm"] = TensorRtLlm()
