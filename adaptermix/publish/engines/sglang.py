"""SGLang: a PEFT folder in one rank and one scale, with target modules listed by their last parts.

Read in SGLang 0.5: `srt/lora/lora_config.py`, `lora.py` (scale), `utils.py` (target modules), `mem_pool.py` (slices).
"""

from __future__ import annotations

from dataclasses import replace

from ...adapters import AdapterMeta, TargetSpec
from ...adapters.lora_config import LoraSettings
from .base import ENGINES, PeftFolder, PlainAdapter


class Sglang(PeftFolder):
    """SGLang. It adapts modules of a list of names, and reads target modules as a list only."""

    name = "sglang"
    modules = frozenset(
        {
            *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj"),
            *("down_proj", "embed_tokens", "lm_head"),
        }
    )
    has_tables = True

    def description(self, adapter: PlainAdapter) -> AdapterMeta:
        return replace(adapter.meta, targets=TargetSpec(modules=adapter.kinds))

    def scale(self, settings: LoraSettings, rank: int) -> float:
        return settings.alpha / settings.rank

    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        return (
            "python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths adapter={adapter} "
            f"--max-lora-rank {adapter.rank} --lora-target-modules {' '.join(adapter.kinds)}",
        )


ENGINES["sglang"] = Sglang()
