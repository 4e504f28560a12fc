"""The rules by which programs turn a PEFT folder into deltas, each in float64 from the two files alone.

As read in their sources: PEFT (`tuners/lora/layer.py`, `utils/other.py`), vLLM (`lora/peft_helper.py`, `set_lora`),
SGLang (`lora_config.py`, `mem_pool.py`), TensorRT-LLM (`lora_manager.py`), llama.cpp (`llama-adapter.h`), MLX
(`lora.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptermix import export

from .factories import CONFIG, WEIGHTS

PREFIX = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class Module:
    """One module's factors as matrices, with its path.

    Shapes: a is [r in], b is [out r].
    """

    path: str
    a: Tensor
    b: Tensor


Rule = Callable[[Module, Mapping[str, Any]], Tensor]


class RefusedByLoaderError(Exception):
    """A program would not load the folder."""


def _pattern(values: Mapping[str, float], path: str, default: float) -> float:
    """Return what PEFT takes for a path: the first pattern that matches its end, after a dot or the start."""
    found = next((key for key in values if re.match(rf"(.*\.)?({key})$", path)), None)
    return default if found is None else values[found]


def _divided(alpha: float, rank: float, config: Mapping[str, Any]) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft(module: Module, config: Mapping[str, Any]) -> Tensor:
    """Patterns for both numbers; the tensors must have that rank."""
    rank = _pattern(config.get("rank_pattern") or {}, module.path, config["r"])
    alpha = _pattern(config.get("alpha_pattern") or {}, module.path, config["lora_alpha"])
    if not module.a.shape[0] == module.b.shape[1] == rank:
        raise RefusedByLoaderError(f"{module.path}: {list(module.a.shape)} is not of rank {rank}")
    return _divided(alpha, rank, config) * (module.b @ module.a)


def vllm(module: Module, config: Mapping[str, Any]) -> Tensor:
    """One scale from `r`; buffers are admitted by `r`, too."""
    if module.a.shape[0] > config["r"]:
        raise RefusedByLoaderError(f"{module.path}: rank {module.a.shape[0]} does not fit a buffer for {config['r']}")
    return _divided(config["lora_alpha"], config["r"], config) * (module.b @ module.a)


def sglang(module: Module, config: Mapping[str, Any]) -> Tensor:
    """One scale from `r`, and slices of exactly `r` ranks."""
    if module.a.shape[0] != config["r"]:
        raise RefusedByLoaderError(f"{module.path}: rank {module.a.shape[0]} does not fit a slice of {config['r']}")
    return _divided(config["lora_alpha"], config["r"], config) * (module.b @ module.a)


def tensorrt(module: Module, config: Mapping[str, Any]) -> Tensor:
    """One alpha over the rank of the tensor."""
    return _divided(config["lora_alpha"], module.a.shape[0], config) * (module.b @ module.a)


def llama_cpp(module: Module, config: Mapping[str, Any]) -> Tensor:
    """One alpha over the rank of the tensor, whatever `use_rslora` says; 1 where alpha is 0."""
    alpha = config["lora_alpha"]
    return (alpha / module.b.shape[1] if alpha else 1.0) * (module.b @ module.a)


def mlx(module: Module, config: Mapping[str, Any]) -> Tensor:
    """One rank and one scale for all layers; `lora_a` is [in r] and `lora_b` is [r out]."""
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    if module.a.shape[0] != rank:
        raise RefusedByLoaderError(f"{module.path}: rank {module.a.shape[0]} is not {rank}")
    lora_a, lora_b = module.a.T, module.b.T
    return (scale * (lora_a @ lora_b)).T


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (peft, vllm, sglang, tensorrt, llama_cpp, mlx)}


def read_modules(folder: Path) -> tuple[list[Module], dict[str, Any]]:
    """Return the modules of a folder in float64, kernels flattened, and its config."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    modules = []
    for name in sorted(tensors):
        for left, right in _PAIRS.items():
            if name.endswith(left):
                stem = name.removesuffix(left)
                a, b = tensors[name].double(), tensors[stem + right].double()
                path = stem.removeprefix(PREFIX)
                modules.append(Module(path, a.reshape(len(a), -1), b.reshape(len(b), a.shape[0])))
    assert modules
    return modules, config


def deltas_by(rule: str, folder: Path) -> dict[str, Tensor]:
    """Return the delta of every module by one program's rule.

    Raises:
        RefusedByLoaderError: the program would not load it.
    """
    modules, config = read_modules(folder)
    return {module.path: RULES[rule](module, config) for module in modules}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the relative Frobenius distance of two whole deltas; a missing module is zero."""
    norm = math.hypot(*(float(delta.norm()) for delta in other.values()))
    lost = [
        float((one.get(path, 0) - other.get(path, torch.zeros(()))).norm())  # type: ignore[operator, union-attr]
        for path in {*one, *other}
    ]
    return math.hypot(*lost) / norm if norm else math.hypot(*lost)


def check_one_meaning(folder: Path) -> dict[str, Tensor]:
    """Check that every program makes the same deltas of a folder, and return them."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    expected = deltas_by("peft", folder)
    for rule in RULES:
        assert distance(deltas_by(rule, folder), expected) < 1e-14, rule  # float64, in another order
    return expected


_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _unpaired(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of a Llama's q or k as transformers has them: the two of a pair lie half a head apart."""
    size = len(rows) // heads
    plain = torch.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            for side in range(2):
                plain[head * size + side * (size // 2) + pair] = rows[head * size + 2 * pair + side]
    return plain


def gguf_deltas(folder: Path, base: Path) -> dict[str, Tensor]:
    """Return the deltas that llama.cpp makes of an exported adapter of a Llama, in the rows of transformers."""
    from gguf import GGUFReader, quants

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    file = GGUFReader(folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert (fields["general.architecture"], fields["general.type"], fields["adapter.type"]) == (
        *("llama", "adapter", "lora"),
    )
    tensors = {
        each.name: torch.tensor(quants.dequantize(each.data, each.tensor_type)).reshape(*reversed(each.shape.tolist()))
        for each in file.tensors
    }
    deltas = {}
    for name in (name for name in tensors if name.endswith(".weight.lora_a")):
        stem = name.removesuffix(".lora_a")
        _, block, part, _ = stem.split(".")
        module = Module(
            f"model.layers.{block}.{_GGUF[part]}", tensors[name].double(), tensors[f"{stem}.lora_b"].double()
        )
        delta = llama_cpp(module, {"lora_alpha": fields["adapter.lora.alpha"]})
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(part)
        deltas[module.path] = _unpaired(delta, heads) if heads else delta
    assert len(tensors) == 2 * len(deltas)
    return deltas


def mlx_deltas(folder: Path) -> dict[str, Tensor]:
    """Return the deltas that mlx-lm makes of an exported adapter."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    parameters, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    assert {f"{path}.lora_{factor}" for path in parameters["keys"] for factor in "ab"} == set(tensors)
    deltas = {}
    for path in parameters["keys"]:
        a, b = (tensors[f"{path}.lora_{factor}"].double() for factor in "ab")
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        deltas[path] = (parameters["scale"] * (a @ b)).T
    return deltas


def exported_deltas(engine: str, folder: Path, base: Path) -> dict[str, Tensor]:
    """Return the deltas that an engine makes of the folder that was exported for it."""
    if engine == "llama.cpp":
        return gguf_deltas(folder, base)
    return mlx_deltas(folder) if engine == "mlx" else deltas_by(engine.removesuffix("-llm"), folder)


def check_exports(folder: Path, base: Path, out: Path, expected: Mapping[str, Tensor]) -> None:
    """Check that every engine makes the expected deltas of an adapter of a Llama that was exported for it.

    Args:
        folder: The adapter.
        base: Its base model.
        out: Folder for the exports.
        expected: The deltas.
    """
    for engine in ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx"):
        report = export(folder=folder, engine=engine, base=str(base), out=out / engine)
        assert distance(exported_deltas(engine, out / engine, base), expected) < 1e-6, engine
        assert report.error is not None
        assert report.error < 1e-6
        assert report.modules.keys() == expected.keys()
