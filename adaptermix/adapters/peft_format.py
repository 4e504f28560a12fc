"""PEFT LoRA folders: headers first, then one module at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..algebra import LowRank
from ..errors import AdapterFormatError, OutputError
from ..files import MANIFEST, sha256
from .lora_config import LoraSettings, dump_config, read_config
from .state import AdapterMeta, AdapterState

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_][A-Za-z0-9_.]*)\.lora_(?P<factor>[AB])\.weight")
_KNOWN_OTHERS = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_": "an embedding LoRA",
    ".lora_B.bias": "a bias inside the LoRA",
    ".bias": "a trained bias",
    "modules_to_save": "a fully trained module",
    "token_adapter": "trainable tokens",
}
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleHeader:
    """Shape of one module's update, known before any tensor is read."""

    out: int
    into: int
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter folder whose headers were checked and whose tensors are read on demand.

    Args:
        path: The folder.
        settings: Its LoRA settings.
        modules: Shape per module path, in the order of the paths.
    """

    path: Path
    settings: LoraSettings
    modules: Mapping[str, ModuleHeader]

    @property
    def meta(self) -> AdapterMeta:
        """What the adapter says of itself."""
        return self.settings.meta

    @property
    def name(self) -> str:
        """Short name for tables: that of the folder."""
        return self.path.resolve().name

    @cached_property
    def digest(self) -> str:
        """Hash of the weights and the settings."""
        return f"{sha256(self.path / WEIGHTS)}+{sha256(self.path / CONFIG)}"

    @cached_property
    def _file(self) -> Any:
        return safe_open(self.path / WEIGHTS, framework="pt")

    def load(self, module: str) -> LowRank:
        """Read the update of one module.

        Raises:
            AdapterFormatError: a factor holds NaN or infinity.
        """
        factors = {}
        for factor in "AB":
            key = f"base_model.model.{module}.lora_{factor}.weight"
            tensor = self._file.get_tensor(key)
            if not torch.isfinite(tensor).all():
                raise AdapterFormatError(
                    f"{self.path}: every weight must be finite, and {key} holds NaN or infinity. "
                    "The training run that wrote it diverged; use an earlier checkpoint."
                )
            factors[factor] = tensor
        return LowRank(a=factors["A"], b=factors["B"], scale=self.modules[module].scale)

    def read(self) -> AdapterState:
        """Read every module."""
        return AdapterState(meta=self.meta, updates={module: self.load(module) for module in self.modules})


def _refuse_key(path: Path, key: str) -> AdapterFormatError:
    for mark, what in _KNOWN_OTHERS.items():
        if mark in key:
            return AdapterFormatError(f"{path}: tensor {key!r} is {what}, which is not handled yet and would be lost.")
    return AdapterFormatError(
        f"{path}: tensor {key[:200]!r} must be named base_model.model.MODULE.lora_A.weight or .lora_B.weight."
    )


def _shapes(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the shape of both factors per module, from the file's header alone."""
    shapes: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                match = _KEY.fullmatch(key)
                if match is None:
                    raise _refuse_key(path, key)
                piece = file.get_slice(key)
                if piece.get_dtype() not in _FLOATS:
                    raise AdapterFormatError(
                        f"{path}: {key} must be of a float dtype ({', '.join(_FLOATS)}), found {piece.get_dtype()}."
                    )
                shape = tuple(piece.get_shape())
                if len(shape) != 2 or 0 in shape:
                    raise AdapterFormatError(
                        f"{path}: {key} must be a matrix, found shape {list(shape)}. Convolutions are not handled yet."
                    )
                shapes.setdefault(match["module"], {})[match["factor"]] = (shape[0], shape[1])
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(
            f"{path} must be a whole safetensors file: {error}. Fetch or save it again."
        ) from error
    return shapes


def _headers(path: Path, settings: LoraSettings) -> dict[str, ModuleHeader]:
    headers = {}
    for module, factors in _shapes(path).items():
        if set(factors) != {"A", "B"}:
            missing = "A" if "B" in factors else "B"
            raise AdapterFormatError(f"{path}: module {module!r} must have both factors, lora_{missing} is missing.")
        (rank, into), (out, rank_b) = factors["A"], factors["B"]
        if not rank == rank_b == settings.rank_of(module):
            raise AdapterFormatError(
                f"{path}: module {module!r} must have rank {settings.rank_of(module)} as {CONFIG} says, "
                f"found lora_A {list(factors['A'])} and lora_B {list(factors['B'])}."
            )
        headers[module] = ModuleHeader(out=out, into=into, rank=rank, scale=settings.scale_of(module))
    if not headers:
        raise AdapterFormatError(f"{path} must hold at least one LoRA module, it is empty.")
    return headers


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} must be JSON: {error}. Remove it to use the adapter without it.") from error
    return manifest if isinstance(manifest, dict) else {}


def open_adapter(path: str | Path) -> AdapterSource:
    """Open a PEFT LoRA folder and check its headers; no tensor is read.

    Raises:
        AdapterFormatError: no such folder, a file is missing or damaged, shapes contradict the settings, or the adapter
            holds something that is not handled (DoRA, biases, heads, embeddings, pickles).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterFormatError(f"an adapter is a folder with {CONFIG} and {WEIGHTS}, and {folder} is no folder.")
    if not (folder / CONFIG).is_file():
        raise AdapterFormatError(f"an adapter folder must hold {CONFIG}, and {folder} does not.")
    if not (folder / WEIGHTS).is_file():
        hint = (
            " adapter_model.bin is a pickle, which is not read; save it as safetensors with peft."
            * (folder / "adapter_model.bin").exists()
        )
        raise AdapterFormatError(f"an adapter folder must hold {WEIGHTS}, and {folder} does not.{hint}")
    settings = read_config(folder / CONFIG, _manifest(folder))
    return AdapterSource(path=folder, settings=settings, modules=_headers(folder / WEIGHTS, settings))


def write_adapter(folder: Path, state: AdapterState, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a PEFT LoRA folder with scale 1: alpha equals rank, and each update's scale lies in its A.

    Args:
        folder: An existing folder.
        state: The adapter.
        dtype: Storage dtype of the factors.

    Raises:
        OutputError: a factor overflows the storage dtype.
    """
    tensors = {}
    for module, update in sorted(state.updates.items()):
        scaled = update.scale * update.a.to(torch.promote_types(update.a.dtype, torch.float32))
        # A copy, since modules that share one tensor cannot be saved.
        a, b = scaled.to(dtype).contiguous(), update.b.to(dtype, copy=True).contiguous()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise OutputError(
                f"the factors of module '{module}' must be finite in {str(dtype).removeprefix('torch.')}, and overflow "
                "it. Choose a wider dtype or smaller weights."
            )
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ranks = {module: update.rank for module, update in state.updates.items()}
    (folder / CONFIG).write_bytes(dump_config(state.meta, ranks))
