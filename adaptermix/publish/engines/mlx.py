"""MLX: the adapter folder of mlx-lm, with transposed factors.

Read in mlx-lm 0.32: `tuner/lora.py` (factors, scale), `tuner/utils.py` (`linear_to_lora_layers`, `load_adapters`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ...adapters.lora_config import CONFIG
from ...algebra import LowRank
from ...errors import PlanError
from ...io.safetensors_writer import tensor_file
from ...io.weight_files import Safetensors
from .base import ENGINES, Engine, PlainAdapter

FILE = "adapters.safetensors"
MODEL_TYPES = (*("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3"),)
"""Model types whose modules have the same paths in mlx-lm as in transformers."""


class Mlx(Engine):
    """MLX. It has one rank and one scale for all modules; A is [in r] and B is [r out]."""

    name = "mlx"
    artifact = "mlx"
    needs_config = True

    def check(self, adapter: PlainAdapter) -> None:
        super().check(adapter)
        model_type = adapter.config.model_type if adapter.config else None
        if model_type not in MODEL_TYPES:
            raise PlanError(
                f"--for mlx converts adapters of the model types {', '.join(MODEL_TYPES)}, and the base of "
                f"'{adapter.name}' is of type {model_type!r}. Bake the adapter into the base, and convert the result "
                "with mlx-lm.",
                code="export.architecture",
            )

    def write(self, folder: Path, adapter: PlainAdapter) -> None:
        rank = adapter.rank
        headers = {}
        for path, header in adapter.headers.items():
            headers[f"{path}.lora_a"] = adapter.dtype, (header.into, rank)
            headers[f"{path}.lora_b"] = adapter.dtype, (rank, header.out)
        with tensor_file(folder / FILE, headers, {"format": "mlx"}) as file:
            for path in adapter.headers:
                update = adapter.padded(path)
                file.write(f"{path}.lora_a", update.a.T.contiguous())
                file.write(f"{path}.lora_b", update.b.T.contiguous())
        config = {
            "fine_tune_type": "lora",
            "lora_parameters": {"dropout": 0.0, "keys": list(adapter.headers), "rank": rank, "scale": 1.0},
            "model": adapter.meta.base,
            "num_layers": adapter.config.num_hidden_layers if adapter.config else -1,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_bytes(text.encode())

    def reader(self, folder: Path, adapter: PlainAdapter) -> Callable[[str], LowRank]:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]
        file = Safetensors(folder / FILE)

        def read(path: str) -> LowRank:
            a, b = file.read(f"{path}.lora_a"), file.read(f"{path}.lora_b")
            return LowRank(b=b.T, a=a.T, scale=float(settings["scale"]))

        return read

    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        return ("mlx_lm.server --model {base} --adapter-path {adapter}",)


ENGINES["mlx"] = Mlx()
