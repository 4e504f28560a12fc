"""llama.cpp, and programs built on it: one GGUF file.

Read in llama.cpp: `convert_lora_to_gguf.py` and `conversion/` (names and order of rows), `src/llama-adapter.h` and
`llama-adapter.cpp` (scale, checks). The `gguf` package writes the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...algebra import LowRank
from ...errors import PlanError
from .base import ENGINES, Engine, PlainAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "adapter.gguf"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp stores a model class.

    Args:
        name: Its name in GGUF.
        has_pairs: Whether the rows of q and k that are rotated together are neighbours in GGUF. transformers keeps them
            half a head apart.
    """

    name: str
    has_pairs: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", has_pairs=True),
    "MistralForCausalLM": Architecture("llama", has_pairs=True),
    "GraniteForCausalLM": Architecture("granite", has_pairs=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", has_pairs=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "Phi3ForCausalLM": Architecture("phi3"),
}
"""Classes whose conversion only renames weights and orders their rows."""


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise PlanError(
            "--for llama.cpp needs the package gguf, which is not installed. Run: pip install 'gguf>=0.17'",
            code="export.no-gguf",
        ) from error
    return gguf


def _class_of(adapter: PlainAdapter) -> str:
    return str(((adapter.config.architectures if adapter.config else None) or [""])[0])


def _heads(config: PreTrainedConfig, path: str) -> int | None:
    """Return the number of heads of a q or k projection; None for other modules."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(path.rpartition(".")[2])
    return None if heads is None else int(getattr(config, heads))


def _rows(config: PreTrainedConfig, path: str) -> int | None:
    """Return the number of output rows of a q or k projection; None for other modules."""
    heads = _heads(config, path)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if heads is None else heads * int(size)


def row_order(config: PreTrainedConfig, path: str, rows: int) -> Tensor:
    """Return for each row of a module in GGUF its row in transformers, for an architecture with pairs.

    Within a head of d rows, transformers rotates rows i and i + d/2 together, and GGUF has them at 2i and 2i + 1.

    Args:
        config: The base model's configuration.
        path: Path of the module.
        rows: Its number of output rows.

    Shapes: [rows], int64.
    """
    heads = _heads(config, path)
    if heads is None:
        return torch.arange(rows)
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


class LlamaCpp(Engine):
    """llama.cpp. It divides one alpha by the rank of each module, and 1 is the scale where both are equal."""

    name = "llama.cpp"
    artifact = "gguf"
    needs_config = True

    def check(self, adapter: PlainAdapter) -> None:
        super().check(adapter)
        _gguf()
        if _class_of(adapter) not in ARCHITECTURES:
            raise PlanError(
                f"--for llama.cpp converts adapters of {', '.join(ARCHITECTURES)}, and the base of '{adapter.name}' is "
                f"'{_class_of(adapter)}'. Bake the adapter into the base, and convert the result with llama.cpp.",
                code="export.architecture",
            )
        self._names(adapter)
        for path, header in adapter.headers.items():
            rows = _rows(adapter.config, path) if adapter.config else None
            if rows is not None and rows != header.out:
                raise PlanError(
                    f"module '{path}' of '{adapter.name}' must have the {rows} output rows that the base model has, "
                    f"found {header.out}. Pass the base model that the adapter was trained on: --base MODEL.",
                    code="export.other-base",
                )

    def _names(self, adapter: PlainAdapter) -> dict[str, str]:
        """Return the name in GGUF of the weight of each module.

        Raises:
            PlanError: the architecture has no such weight.
        """
        gguf = _gguf()
        in_gguf = ARCHITECTURES[_class_of(adapter)].name
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == in_gguf)
        known = gguf.get_tensor_name_map(architecture, adapter.config.num_hidden_layers if adapter.config else 0)
        names = {path: known.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path in adapter.headers}
        unknown = sorted(path for path, name in names.items() if name is None)
        if unknown:
            raise PlanError(
                f"GGUF must have a name for every module of '{adapter.name}', and lacks one for '{unknown[0]}' of "
                f"architecture '{in_gguf}'. Bake the adapter into the base, and convert the result with llama.cpp.",
                code="export.gguf-name",
            )
        return names

    def _order(self, adapter: PlainAdapter, path: str) -> Tensor:
        rows = adapter.headers[path].out
        if adapter.config is None or not ARCHITECTURES[_class_of(adapter)].has_pairs:
            return torch.arange(rows)
        return row_order(adapter.config, path, rows)

    def write(self, folder: Path, adapter: PlainAdapter) -> None:
        gguf = _gguf()
        writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURES[_class_of(adapter)].name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
        names, form = self._names(adapter), _FORMS[adapter.dtype]
        for path, name in names.items():
            update = adapter.padded(path)
            for factor, tensor in (("a", update.a), ("b", update.b[self._order(adapter, path)])):
                kind = gguf.GGMLQuantizationType[form]
                data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
                writer.add_tensor(f"{name}.lora_{factor}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def reader(self, folder: Path, adapter: PlainAdapter) -> Callable[[str], LowRank]:
        gguf = _gguf()
        file = gguf.GGUFReader(folder / FILE)
        alpha = float(file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
        tensors, names = {tensor.name: tensor for tensor in file.tensors}, self._names(adapter)

        def factor(name: str) -> Tensor:
            tensor = tensors[name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            return torch.tensor(values).reshape([int(size) for size in reversed(tensor.shape)])

        def read(path: str) -> LowRank:
            a, b = (factor(f"{names[path]}.lora_{letter}") for letter in "ab")
            rows = torch.empty_like(b)
            rows[self._order(adapter, path)] = b
            return LowRank(b=rows, a=a, scale=alpha / b.shape[1] if alpha else 1.0)

        return read

    def commands(self, adapter: PlainAdapter) -> tuple[str, ...]:
        return (
            "python convert_hf_to_gguf.py {base} --outfile base.gguf",
            f"llama-server -m base.gguf --lora {{adapter}}/{FILE}",
        )


_FORMS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""GGUF's names of the storage dtypes."""

ENGINES["llama.cpp"] = LlamaCpp()
