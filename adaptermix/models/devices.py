"""Devices and dtypes of models, by the values of `--device` and `--dtype`."""

from __future__ import annotations

import torch

from ..errors import ModelError


def pick_device(device: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelError: there is no such CUDA device, or the name is unknown.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"--device must be auto, cpu, cuda or cuda:N, got {device!r}.", code="device.unknown"
        ) from error
    if picked.type not in ("cpu", "cuda"):
        raise ModelError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}.", code="device.unknown")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"--device {device} needs a CUDA device, and {torch.cuda.device_count()} CUDA devices are available. "
            "Choose one of those, or --device cpu.",
            code="device.not-there",
        )
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `auto`, `float32`, `bfloat16` or `float16`.

    `auto` is bfloat16 on hardware with native bfloat16 products (CUDA, CPUs with AVX512-BF16 or AMX), else float32.
    """
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32
