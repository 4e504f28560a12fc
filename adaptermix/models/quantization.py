"""Base models in 4 or 8 bits: through bitsandbytes, or rounded after they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from ..errors import ModelError
from ..io.json_types import JsonObject
from .formats import BLOCK, FORMATS, known_formats, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.quantizers.base import QuantizationConfigMixin


class LoadingOptions(TypedDict, total=False):
    """Arguments of `from_pretrained` for a quantised model."""

    quantization_config: QuantizationConfigMixin
    device_map: dict[str, torch.device]


_POOLER = ("pooler.dense", "pooler")
"""Poolers of encoders. Many checkpoints lack them, and new weights are not quantised on loading."""


def skipped_modules(whole: Sequence[str] | None) -> list[str]:
    """Return the names of the modules that transformers must not quantise, besides its own default for language models.

    Args:
        whole: Names of a head's modules, empty for encoders without a head; None for a language model, for which the
            result is empty.
    """
    return [] if whole is None else [*whole, *_POOLER]


def loading_options(
    quantize: str, device: torch.device, dtype: torch.dtype, *, whole: Sequence[str] | None = None
) -> LoadingOptions:
    """Return the arguments of `from_pretrained` for a quantised model.

    Args:
        quantize: "none" or the name of a format: "nf4", "fp4" (both with double quantisation, as in QLoRA), "int8".
            Formats that transformers cannot round to need no arguments; see `round_weights`.
        device: The model's device; quantised weights are moved while they are loaded.
        dtype: Dtype of computation, and of weights that are not quantised.
        whole: Names of a head's modules, which are not quantised; empty for encoders without a head. None uses the
            default of transformers, which keeps the output layer of a language model.

    Raises:
        ModelError: the package of the format is not installed.

    Reference: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, section 3; LLM.int8(), 2022, arXiv 2208.07339.
    """
    if quantize == "none":
        return {}
    form = FORMATS[quantize]
    if form.package is not None and find_spec(form.package) is None:
        raise ModelError(
            f"--quantize {quantize} needs {form.package}, which is not installed. Run: pip install {form.package}",
            code="quantize.no-bitsandbytes",
        )
    config = form.config(dtype, None if whole is None else skipped_modules(whole))
    return {} if config is None else {"quantization_config": config, "device_map": {"": device}}


def round_weights(model: PreTrainedModel, quantize: str, whole: Sequence[str] | None) -> None:
    """Round the linear layers of a model to a format that transformers cannot round to while it loads a model.

    The dequantised values of the codes replace the weights, so the model takes as much memory as before.

    Args:
        model: The model, not quantised.
        quantize: "none" or the name of a format; for other formats than described the model does not change.
        whole: As for `loading_options`.
    """
    form = FORMATS[quantize] if quantize != "none" else None
    if form is None or form.package is not None:
        return
    left, head = skipped_modules(whole), model.get_output_embeddings() if whole is None else None
    for path, module in model.named_modules():
        if type(module).__name__ in form.modules and module is not head and not is_skipped(path, left):
            weight = module.weight.data
            if form.fits(weight.shape):
                weight.copy_(form(weight).weight())


def is_skipped(path: str, names: Sequence[str]) -> bool:
    """Return whether a module has one of these names or is a part of such a module."""
    return any(f".{name}." in f".{path}." for name in names)


def check_reading(model: PreTrainedModel) -> None:
    """Refuse a 4-bit model on a CPU whose weights bitsandbytes reads wrongly.

    On processors with AVX-512 its kernel (0.50) assumes that rows consist of full blocks. Rows of 32 or 96 numbers, for
    example, are off by a quarter. Every row length of the model is tried on a few random weights.

    Raises:
        ModelError: the model has such rows.
    """
    tried: set[tuple[str, int]] = set()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or module.weight.device.type != "cpu":
            continue
        kind, width = str(state.quant_type), int(state.shape[-1])
        if (kind, width) not in tried and not _is_read_correctly(kind, width):
            raise ModelError(
                f"bitsandbytes reads 4-bit rows of {width} numbers wrongly on this processor, and the model has such "
                "rows. Use --quantize int8 or none, or a GPU.",
                code="quantize.processor",
            )
        tried.add((kind, width))


def _is_read_correctly(kind: str, width: int) -> bool:
    from bitsandbytes import functional

    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type=kind)
    weights = functional.dequantize_4bit(codes, state)
    scales = state.absmax.repeat_interleave(BLOCK)[: rows.numel()]
    values = state.code[unpack(codes, rows.numel()).long()]
    return torch.allclose(weights.flatten(), values * scales, rtol=1e-3, atol=1e-3)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Set the compute dtype of 4-bit layers, overriding the checkpoint's config: float16 is slow on CPUs."""
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def keep_codes(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from rewriting 4-bit weights on a CPU.

    On processors with bfloat16 it rewrites them in place at the first pass without gradients: scales are rounded to
    bfloat16, gradients no longer pass, and rows shorter than a block fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stored_format(config: PreTrainedConfig) -> str:
    """Return the quantisation format in a checkpoint's config, such as "nf4"; "none" for unquantised weights.

    Args:
        config: A model's config.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, Mapping) or stored is None else stored.to_dict()
    return (
        next((name for name, form in known_formats().items() if form.is_config(stored)), "none") if stored else "none"
    )


def identity(quantize: str) -> JsonObject | None:
    """Return the manifest entry of the quantiser; None without one."""
    return None if quantize == "none" else FORMATS[quantize].identity


def stored_norm(module: nn.Module) -> float | None:
    """Return the Frobenius norm of a linear layer's weight, without changing the layer.

    4-bit weights are dequantised for it; for 8 bits the norm follows from codes and scales. None for other formats.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    if hasattr(weight, "full_tensor"):  # Several processes share this weight.
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
