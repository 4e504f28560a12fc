"""Base models in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

BLOCK = 64
"""Weights that share a scale in 4 bits; bitsandbytes' default."""


_POOLER = ("pooler.dense", "pooler")
"""Of encoders. Many checkpoints lack it, and what is new is not quantised while it is loaded."""


def skipped_modules(whole: Sequence[str] | None) -> list[str]:
    """Return the names of modules that are not quantised, beside the output layer of a language model.

    Args:
        whole: Names of a head's modules, empty for encoders without a head; None for a language model.
    """
    return [] if whole is None else [*whole, *_POOLER]


def loading_options(
    quantize: str, device: torch.device, dtype: torch.dtype, *, whole: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return what `from_pretrained` must be told.

    Args:
        quantize: "none", "nf4", "fp4" (both with double quantisation, as QLoRA has it) or "int8".
        device: Where the model goes; quantised weights are placed while they are loaded.
        dtype: Of the arithmetic, and of what is not quantised.
        whole: Names of a head's modules, which are not quantised, empty for encoders without a head; None leaves it to
            transformers, which keeps the output layer of a language model.

    Raises:
        ModelError: bitsandbytes is not installed.

    Reference: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, section 3; LLM.int8(), 2022, arXiv 2208.07339.
    """
    if quantize == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantize {quantize} needs bitsandbytes, which is not installed. Run: pip install bitsandbytes"
        )
    skipped = None if whole is None else skipped_modules(whole)
    config = config_of_format(quantize, dtype=dtype, skipped=skipped)
    return {"quantization_config": config, "device_map": {"": device}}


def config_of_format(quantize: str, *, dtype: torch.dtype | str, skipped: Sequence[str] | None) -> Any:
    """Return how transformers names a format.

    Args:
        quantize: "nf4", "fp4" or "int8".
        dtype: Of the arithmetic, of formats in 4 bits.
        skipped: Names of modules that are not quantised; None for the output layer of a language model.
    """
    from transformers import BitsAndBytesConfig

    # the name is that of the first of these formats, and counts for all of them
    left: dict[str, Any] = {} if skipped is None else {"llm_int8_skip_modules": list(skipped)}
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **left,
    )


def check_reading(model: nn.Module) -> None:
    """Refuse a 4-bit model on a CPU whose weights bitsandbytes reads wrongly.

    On processors with AVX-512 its kernel (0.50) takes each row for whole blocks: of rows of 32 or 96 numbers, say, it
    reads weights that are off by a quarter. Each length of rows that the model has is tried on a few random ones.

    Raises:
        ModelError: there are such rows.
    """
    module: Any
    tried: set[tuple[str, int]] = set()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or module.weight.device.type != "cpu":
            continue
        kind, width = str(state.quant_type), int(state.shape[-1])
        if (kind, width) not in tried and not _reads(kind, width):
            raise ModelError(
                f"bitsandbytes reads 4-bit rows of {width} numbers wrongly on this processor, and the model has such. "
                "Use --quantize int8 or none, or a GPU."
            )
        tried.add((kind, width))


def _reads(kind: str, width: int) -> bool:
    from bitsandbytes import functional

    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type=kind)
    found = functional.dequantize_4bit(codes, state)
    scales = state.absmax.repeat_interleave(BLOCK)[: rows.numel()]
    values = state.code[unpack(codes, rows.numel()).long()]
    return torch.allclose(found.flatten(), values * scales, rtol=1e-3, atol=1e-3)


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Return one code per weight in 4 bits; the first of two is in the high half of a byte."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:count]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in a dtype, whatever the checkpoint's config says: float16 is slow on CPUs."""
    module: Any
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def keep_codes(model: nn.Module) -> None:
    """Keep 4-bit weights on a CPU as they were loaded.

    On processors with bfloat16 bitsandbytes rewrites them in place at the first pass without gradients: their scales
    are rounded to bfloat16, no gradient passes any more, and rows shorter than a block fail.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stored_format(config: Any) -> str:
    """Return the format that the config of a checkpoint names, such as "nf4"; "none" for weights in whole precision.

    Args:
        config: A model's config.
    """
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, Mapping) or found is None else found.to_dict()
    if not found or found.get("quant_method") != "bitsandbytes":
        return "none"
    return "int8" if found.get("load_in_8bit") else str(found.get("bnb_4bit_quant_type", "fp4"))


def identity(quantize: str) -> dict[str, Any] | None:
    """Return what a manifest says of the quantiser; None if there is none."""
    if quantize == "none":
        return None
    if quantize == "int8":
        return {"format": "int8"}
    return {"format": quantize, "block_size": BLOCK, "double": True}


def stored_norm(module: nn.Module) -> float | None:
    """Return the Frobenius norm of a linear layer's weight as the layer uses it, and leave the layer alone.

    A weight in 4 bits is dequantised for it; in 8 bits the norm follows from codes and scales. None where neither the
    weight is floating point nor its format one of these.
    """
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "full_tensor"):  # several processes hold it in shares
        weight = weight.full_tensor()
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if scales is not None:
        weight = weight.data.double() * (scales.double() / 127)[:, None]
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
