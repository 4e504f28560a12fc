"""What an alignment in closed form takes of the settings of `train-align`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .training import AlignSettings

RANKS = {"least-squares": 64, "mean-shift": 1}
"""Rank of each closed form where none is given."""
_TAKEN = {
    *("base", "pairs", "dev_pairs", "rows", "layer", "pooling", "exclude_bos", "balance", "max_length", "batch_size"),
    *("fit", "rank", "on_top_of", "device", "dtype", "quantize", "seed", "out", "overwrite", "resume", "dry_run"),
    "allow_tested",
}
"""Settings that mean something without gradient steps."""


def rank_of_fit(values: Any) -> Any:
    """Add the rank that suits a closed form, where none is given."""
    if isinstance(values, dict) and values.get("rank") is None and values.get("fit") in RANKS:
        return {**values, "rank": RANKS[values["fit"]]}
    return values


def sound_fit(settings: AlignSettings) -> AlignSettings:
    """Refuse, for a closed form, options that only gradient steps use."""
    if settings.fit not in RANKS:
        return settings
    fields = type(settings).model_fields
    moved = [name for name in fields if name not in _TAKEN and getattr(settings, name) != fields[name].default]
    if moved:
        option = moved[0].replace("_", "-")
        raise ValueError(f"--fit {settings.fit} takes no gradient steps, which --{option} is about: drop --{option}")
    if settings.fit == "mean-shift" and settings.rank != 1:
        raise ValueError(f"--fit mean-shift adds one vector, a LoRA of rank 1, got --rank {settings.rank}: drop it")
    return settings
