"""PEFT's `adapter_config.json` for LoRA: strict reading, byte-stable writing.

A setting is either understood here, or known to leave the delta alone, or must be switched off. Anything else is
refused by name, because what is dropped in silence is a wrong adapter that looks right.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError
from .state import AdapterMeta, TargetSpec

MAX_CONFIG_BYTES = 16 * 2**20
MAX_RANK = 2**20

_UNDERSTOOD = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "fan_in_fan_out",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "megatron_config",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "ensure_weight_tying",
}
_REFUSED = {
    "use_dora": "DoRA adapters (use_dora) are not handled yet: their magnitudes would be lost",
    "lora_bias": "biases inside the LoRA (lora_bias) are not handled yet: they would be lost",
    "modules_to_save": "fully trained modules (modules_to_save), such as heads, are not handled yet",
    "trainable_token_indices": "trainable tokens (trainable_token_indices) are not handled yet",
    "target_parameters": "adapters on bare parameters (target_parameters) are not handled yet",
    "layer_replication": "replicated layers (layer_replication) are not handled yet",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) acts on some tokens only and cannot be merged",
    "use_qalora": "QA-LoRA (use_qalora) is not handled yet",
}
# Initialisations that leave the base as it was, so that the saved factors are the whole delta.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings of a PEFT LoRA that decide its delta."""

    meta: AdapterMeta
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Return the rank that the settings give to a module."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return alpha/r, or alpha/sqrt(r) with rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the end of the path as a regular expression."""
    for key, value in patterns.items():
        if re.match(_suffix(key), module):
            return value
    return default


def _suffix(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFormatError(f"{path} must be at most {MAX_CONFIG_BYTES} bytes, it has {path.stat().st_size}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits, nesting
        raise AdapterFormatError(f"{path} must be JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object, found {type(config).__name__}.")
    return config


def _refuse_unhandled(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{path}: only peft_type 'LORA' is handled, found {config.get('peft_type')!r}.")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterFormatError(f"{path}: {reason}.")
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(
            f"{path}: trained biases (bias={config['bias']!r}) are not handled yet: they would be lost."
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise AdapterFormatError(
            f"{path}: init_lora_weights={init!r} changes the base weights, so the factors alone are not the delta. "
            "Convert the adapter to a plain LoRA when saving (peft: path_initial_model_for_weight_conversion)."
        )
    known = _UNDERSTOOD | _WITHOUT_EFFECT | set(_REFUSED) | {"bias", "init_lora_weights"}
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, []):
            raise AdapterFormatError(
                f"{path}: unknown setting {key!r} = {json.dumps(value)[:80]} might change the delta. "
                "If it does not, remove it from the file."
            )


def _number(config: Mapping[str, Any], key: str, path: Path) -> float:
    value = config.get(key)
    # A comparison, since a whole number of any length compares with a float, and NaN with none.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AdapterFormatError(f"{path}: {key} must be a finite number, found {str(value)[:80]!r}.")
    return value


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterFormatError(f"{path}: {key} must be true or false, found {value!r}.")
    return bool(value)


def _rank(value: object, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterFormatError(f"{path}: {key} must be a whole number from 1 to {MAX_RANK}, found {value!r}.")
    return value


def _pattern(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path}: {key} must map modules to numbers, found {value!r}.")
    for module in value:
        try:
            re.compile(_suffix(module))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterFormatError(f"{path}: {key} has {module!r}, which is no regular expression.") from error
    return value


def _strings(value: object, key: str, path: Path) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterFormatError(f"{path}: {key} must be a list of names or one string, found {value!r}.")


def _targets(config: Mapping[str, Any], path: Path) -> TargetSpec:
    modules = _strings(config.get("target_modules"), "target_modules", path)
    if not modules:
        raise AdapterFormatError(f"{path}: target_modules must name the adapted modules, found {modules!r}.")
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
        raise AdapterFormatError(f"{path}: layers_to_transform must be whole numbers, found {layers!r}.")
    pattern = _strings(config.get("layers_pattern"), "layers_pattern", path)
    return TargetSpec(
        modules=modules,
        layers=tuple(layers) if layers else None,
        layers_pattern=((pattern,) if isinstance(pattern, str) else pattern) or None,
        exclude=_strings(config.get("exclude_modules"), "exclude_modules", path) or None,
    )


def read_config(path: Path, manifest: Mapping[str, Any]) -> LoraSettings:
    """Read an `adapter_config.json`.

    Args:
        path: The file.
        manifest: The manifest beside it, or an empty mapping.

    Raises:
        AdapterFormatError: it is no LoRA, is malformed, or uses something that would be lost.
    """
    config = _load(path)
    _refuse_unhandled(config, path)
    ranks = _pattern(config, "rank_pattern", path)
    alphas = _pattern(config, "alpha_pattern", path)
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    return LoraSettings(
        meta=AdapterMeta(
            base=str(base) if base else None,
            revision=str(revision) if revision else None,
            task_type=config.get("task_type"),
            targets=_targets(config, path),
            fan_in_fan_out=_flag(config, "fan_in_fan_out", path),
            manifest=manifest,
        ),
        rank=_rank(config.get("r"), "r", path),
        alpha=_number(config, "lora_alpha", path),
        rslora=_flag(config, "use_rslora", path),
        rank_pattern={key: _rank(value, f"rank_pattern.{key}", path) for key, value in ranks.items()},
        alpha_pattern={key: _number(alphas, key, path) for key in alphas},
    )


def dump_config(meta: AdapterMeta, ranks: Mapping[str, int]) -> bytes:
    """Return the `adapter_config.json` of an adapter whose scale is 1 everywhere (alpha equals rank).

    Args:
        meta: Base, task type and targets.
        ranks: Rank of each module path; the commonest becomes `r`, the others stand in the patterns.
    """
    common = Counter(sorted(ranks.values())).most_common(1)[0][0]
    # A path is a regular expression to PEFT, which matches the end of a path: dots are escaped, the start is anchored.
    others = {"^" + re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != common}
    spec = meta.targets
    config = {
        "alpha_pattern": others,
        "base_model_name_or_path": meta.base,
        "bias": "none",
        "exclude_modules": spec.exclude,
        "fan_in_fan_out": meta.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": spec.layers_pattern,
        "layers_to_transform": spec.layers,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "revision": meta.revision,
        "target_modules": spec.modules if isinstance(spec.modules, str) else sorted(spec.modules),
        "task_type": meta.task_type,
        "use_rslora": False,
    }
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
