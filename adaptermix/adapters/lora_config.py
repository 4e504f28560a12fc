"""PEFT's `adapter_config.json` for LoRA: strict reading, byte-stable writing.

A setting is either read here, or known not to change the delta, or must be switched off. Anything else is refused by
name, because an ignored setting would give a wrong adapter that looks right.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterFormatError
from ..io.json_types import JsonObject
from ..io.weight_files import one_line
from .patterns import PatternMap, read_patterns
from .state import INPUT_EMBEDDINGS, AdapterMeta, TargetSpec
from .targets import written_targets

CONFIG = "adapter_config.json"
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
    "bias",
    "init_lora_weights",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_dora",
    "ensure_weight_tying",
}
_FUSION = (
    *("fusion", "fusion_alignment", "fusion_norm", "fusion_offset", "fusion_pads"),
    *("fusion_dropout", "fusion_encoder", "fusion_tag", "fusion_layer"),
)
"""Settings of a LoRA that fuses its input with a source text; see `fusion`."""
_WITHOUT_EFFECT = {
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "megatron_config",
    "runtime_config",
    "loftq_config",
    # of initialisations that are refused where they are used, and of training alone
    "corda_config",
    "velora_config",
    "eva_config",
    "qalora_group_size",
}
_REFUSED = {
    "target_parameters": "adapters on bare parameters (target_parameters) are not handled",
    "layer_replication": "replicated layers (layer_replication) are not handled",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) acts on some tokens only and cannot be merged",
    "use_qalora": "QA-LoRA (use_qalora) pools its inputs, so its factors are not a delta, and is not handled",
    "use_bdlora": "BD-LoRA (use_bdlora) has block-diagonal factors and is not handled",
    "kasa_config": "KaSA (kasa_config) scales between its factors and truncates the base weight, and is not handled",
    "arrow_config": "Arrow (arrow_config) routes each token and cannot be merged",
    "monteclora_config": "MonteCLoRA (monteclora_config) samples its factors and is not handled",
}
# Initialisations that do not change the base, so that the saved factors are the whole delta.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica", None)
# Those that take a part of the base weight which can be computed again from the weight itself.
_FROM_BASE = ("pissa", "olora")
_OTHER_INITS = {
    "pissa_niter": "its randomised SVD cannot be repeated, so the factors alone are not the delta",
    "corda": "it takes a part of the base weights that depends on data, so the factors alone are not the delta",
    "lora_ga": "it takes a part of the base weights that depends on data, so the factors alone are not the delta",
    "loftq": "it replaces the base by quantised weights, so the factors alone are not the delta",
}
_PEFT_ALPHA = 8
"""What PEFT takes where the settings have no `lora_alpha`."""
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings of a PEFT LoRA that decide its delta."""

    meta: AdapterMeta
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternMap
    alpha_pattern: PatternMap
    lora_bias: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank that the settings give to a module."""
        return int(self.rank_pattern.of(module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the settings give to a module."""
        return float(self.alpha_pattern.of(module, self.alpha))

    def scale_of(self, module: str) -> float:
        """Return alpha/r, or alpha/sqrt(r) with rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732)."""
        rank = int(self.rank_pattern.of(module, self.rank))
        return self.alpha_pattern.of(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def label(value: object) -> str:
    """Return a value from the file for a message, on one line and cut to a length."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # numbers of thousands of digits, nesting
        return f"a {type(value).__name__}"


def load_config(path: Path) -> JsonObject:
    """Read an `adapter_config.json`.

    Raises:
        AdapterFormatError: it is too large, cannot be read, or is not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise AdapterFormatError(
                f"{path} must be at most {MAX_CONFIG_BYTES} bytes, it has {size}.", code="config.too-large"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits, nesting
        raise AdapterFormatError(
            f"{path} must be JSON: {one_line(error)}. Save the adapter again.", code="config.not-json"
        ) from error
    except OSError as error:
        raise AdapterFormatError(f"{path} must be readable: {one_line(error)}.", code="config.unreadable") from error
    if not isinstance(config, dict):
        raise AdapterFormatError(
            f"{path} must hold a JSON object, found {type(config).__name__}.", code="config.not-object"
        )
    return config


def _refuse_unhandled(config: Mapping[str, object], path: Path) -> None:
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterFormatError(f"{path}: {reason}.", code="config.unsupported")
    known = _UNDERSTOOD | _WITHOUT_EFFECT | set(_REFUSED) | set(_FUSION)
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, []):
            raise AdapterFormatError(
                f"{path}: unknown setting {label(key)} = {label(value)} might change the delta. "
                "If it does not, remove it from the file.",
                code="config.unknown-setting",
            )
    if (config.get("bias") or "none") not in _BIASES:
        raise AdapterFormatError(
            f"{path}: bias must be one of {', '.join(_BIASES)}, found {label(config['bias'])}.", code="config.bias"
        )
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        raise AdapterFormatError(
            f"{path}: modules_to_save with ensure_weight_tying is not handled: the tied copies would part. "
            "Save the adapter without ensure_weight_tying.",
            code="config.weight-tying",
        )


def _initial(config: Mapping[str, object], path: Path) -> str | None:
    """Return the name of the part of the base that training started from, None if the factors are the whole delta."""
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    if name in _PLAIN_INITS:
        return None
    if name in _FROM_BASE:
        return str(name)
    reason = next(
        (text for key, text in _OTHER_INITS.items() if str(name).startswith(key)),
        "it might change the base weights, so the factors alone would not be the delta",
    )
    raise AdapterFormatError(
        f"{path}: init_lora_weights={label(init)} is not handled: {reason}. "
        "Convert the adapter to a plain LoRA when saving (peft: path_initial_model_for_weight_conversion).",
        code="config.init",
    )


def _number(value: object, key: str, path: Path) -> float:
    # A comparison, since a whole number of any length compares with a float, and NaN with none.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AdapterFormatError(f"{path}: {key} must be a finite number, found {label(value)}.", code="config.number")
    return value


def _flag(config: Mapping[str, object], key: str, path: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterFormatError(f"{path}: {key} must be true or false, found {label(value)}.", code="config.flag")
    return bool(value)


def _rank(value: object, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterFormatError(
            f"{path}: {key} must be a whole number from 1 to {MAX_RANK}, found {label(value)}.", code="config.rank"
        )
    return value


def _pattern(config: Mapping[str, object], key: str, path: Path, check: Callable[..., float]) -> PatternMap:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(
            f"{path}: {key} must map modules to numbers, found {label(value)}.", code="config.pattern"
        )
    checked = {module: check(value[module], f"{key}.{one_line(module, 80)}", path) for module in value}
    return read_patterns(checked, f"{path}: {key}")


def _strings(value: object, key: str, path: Path) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise AdapterFormatError(
        f"{path}: {key} must be a list of names or one string, found {label(value)}.", code="config.names"
    )


def _targets(config: Mapping[str, object], path: Path) -> TargetSpec:
    modules = _strings(config.get("target_modules"), "target_modules", path)
    if not modules:
        raise AdapterFormatError(
            f"{path}: target_modules must name the adapted modules, found {label(modules)}.",
            code="config.target-modules",
        )
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
        raise AdapterFormatError(
            f"{path}: layers_to_transform must be whole numbers, found {label(layers)}.", code="config.layers"
        )
    pattern = _strings(config.get("layers_pattern"), "layers_pattern", path)
    return TargetSpec(
        modules=modules,
        layers=tuple(layers) if layers else None,
        layers_pattern=((pattern,) if isinstance(pattern, str) else pattern) or None,
        exclude=_strings(config.get("exclude_modules"), "exclude_modules", path) or None,
        tied=_flag(config, "ensure_weight_tying", path),
    )


def _text(config: Mapping[str, object], key: str, path: Path) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterFormatError(f"{path}: {key} must be text or null, found {label(value)}.", code="config.text")
    return value or None


def _saved_modules(config: Mapping[str, object], path: Path) -> tuple[str, ...]:
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterFormatError(
            f"{path}: modules_to_save must be a list of names, found {label(names)}.", code="config.saved-modules"
        )
    return tuple(dict.fromkeys(names))  # PEFT appends its own heads each time a model is wrapped


def _tokens(config: Mapping[str, object], path: Path) -> dict[str, tuple[int, ...]]:
    value = config.get("trainable_token_indices") or {}
    tables = {INPUT_EMBEDDINGS: value} if isinstance(value, list) else value
    if not isinstance(tables, dict) or not all(
        isinstance(ids, list) and ids and all(type(token) is int and token >= 0 for token in ids)
        for ids in tables.values()
    ):
        raise AdapterFormatError(
            f"{path}: trainable_token_indices must be token ids, or map embeddings to token ids, found {label(value)}.",
            code="config.token-indices",
        )
    return {str(table): tuple(ids) for table, ids in tables.items()}


def read_config(config: JsonObject, path: Path, manifest: Mapping[str, object]) -> LoraSettings:
    """Return the settings of a LoRA from the content of its `adapter_config.json`.

    Args:
        config: The content.
        path: The file, for messages.
        manifest: The manifest in its folder, or an empty mapping.

    Raises:
        AdapterFormatError: it is malformed, or uses a feature that would be lost.
    """
    _refuse_unhandled(config, path)
    dora, lora_bias = _flag(config, "use_dora", path), _flag(config, "lora_bias", path)
    initial, fan_in_fan_out = _initial(config, path), _flag(config, "fan_in_fan_out", path)
    if dora and lora_bias:
        raise AdapterFormatError(
            f"{path}: use_dora with lora_bias is not handled: PEFT adds the bias to the weight in DoRA's norm.",
            code="config.dora-with-bias",
        )
    if initial == "olora" and fan_in_fan_out:
        raise AdapterFormatError(
            f"{path}: init_lora_weights='olora' with fan_in_fan_out is not handled: PEFT takes the transposed weight.",
            code="config.olora-transposed",
        )
    return LoraSettings(
        meta=AdapterMeta(
            base=_text(config, "base_model_name_or_path", path),
            revision=_text(config, "revision", path),
            task_type=_text(config, "task_type", path),
            targets=_targets(config, path),
            fan_in_fan_out=fan_in_fan_out,
            manifest=manifest,
            dora=dora,
            saved_modules=_saved_modules(config, path),
            bias=str(config.get("bias") or "none"),
            trainable_tokens=_tokens(config, path),
            initial=initial,
            fusion={key: config[key] for key in _FUSION if key in config} if config.get("fusion") else {},
        ),
        rank=_rank(config.get("r"), "r", path),
        alpha=_number(config.get("lora_alpha", _PEFT_ALPHA), "lora_alpha", path),
        rslora=_flag(config, "use_rslora", path),
        rank_pattern=_pattern(config, "rank_pattern", path, _rank),
        alpha_pattern=_pattern(config, "alpha_pattern", path, _number),
        lora_bias=lora_bias,
    )


def _extras(meta: AdapterMeta, *, lora_bias: bool) -> JsonObject:
    """Return the settings beyond plain LoRA that are in use; absent ones are off to PEFT."""
    tokens = {table: list(ids) for table, ids in sorted(meta.trainable_tokens.items())}
    is_list = list(tokens) == [INPUT_EMBEDDINGS]
    extras: JsonObject = {
        "use_dora": meta.dora,
        "lora_bias": lora_bias,
        "modules_to_save": list(meta.saved_modules),
        "trainable_token_indices": tokens[INPUT_EMBEDDINGS] if is_list else tokens,
    }
    return {key: value for key, value in extras.items() if value}


def dump_config(meta: AdapterMeta, ranks: Mapping[str, int], *, lora_bias: bool = False) -> bytes:
    """Return the `adapter_config.json` of an adapter whose scale is 1 everywhere (alpha equals rank).

    Args:
        meta: Base, task type and targets.
        ranks: Rank of each module path; the largest becomes `r`, others go into the patterns.
        lora_bias: Whether each module has a bias inside its LoRA.
    """
    # The largest: servers admit an adapter and size their buffers by `r` alone.
    largest = max(ranks.values())
    # A path is a regular expression to PEFT, which matches the end of a path: dots are escaped, the start is anchored.
    others = {"^" + re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != largest}
    spec = written_targets(meta, ranks)
    config = {
        "alpha_pattern": others,
        "base_model_name_or_path": meta.base,
        "bias": meta.bias,
        "exclude_modules": spec.exclude,
        "fan_in_fan_out": meta.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": spec.layers_pattern,
        "layers_to_transform": spec.layers,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": others,
        "revision": meta.revision,
        "target_modules": spec.modules if isinstance(spec.modules, str) else sorted(spec.modules),
        "task_type": meta.task_type,
        "use_rslora": False,
    } | _extras(meta, lora_bias=lora_bias)
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
