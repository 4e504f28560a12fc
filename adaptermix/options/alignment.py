"""Which settings of alignment go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from .training import AlignOptions, AlignSettings

RANKS = {"least-squares": 64, "mean-shift": 1}
"""Rank of each closed form where none is given."""
_TAKEN = {
    *("base", "pairs", "dev_pairs", "rows", "layer", "pooling", "exclude_bos", "balance", "max_length", "batch_size"),
    *("fit", "rank", "on_top_of", "device", "dtype", "quantize", "seed", "out", "overwrite", "resume", "dry_run"),
    "allow_tested",
}
"""Settings that a closed form uses."""


def rank_of_fit(values: Any) -> Any:
    """Add the rank that suits a closed form, where none is given."""
    if isinstance(values, dict) and values.get("rank") is None and values.get("fit") in RANKS:
        return {**values, "rank": RANKS[values["fit"]]}
    return values


def sound_fit(settings: AlignSettings) -> AlignSettings:
    """Refuse, for a closed form, options that only gradient steps use."""
    if settings.fit not in RANKS:
        return settings
    moved = checks.changed(settings, (name for name in type(settings).model_fields if name not in _TAKEN))
    if moved:
        option = moved[0].replace("_", "-")
        raise ValueError(f"--{option} is an option of training, and --fit {settings.fit} does not train: drop one")
    if settings.fit == "mean-shift" and settings.rank != 1:
        raise ValueError(f"--fit mean-shift adds one vector, a LoRA of rank 1, got --rank {settings.rank}: drop --rank")
    return settings


_OF_CONTRAST = (
    *("temperature", "symmetric", "anchor", "stop_gradient", "pooling", "mask_duplicates", "standardize"),
    *("gather_negatives", "keeper"),
)


def contrast_if_asked(values: Any) -> Any:
    """Choose the contrastive objective where none is given and an option is that only goes with it."""
    if not isinstance(values, dict) or values.get("objective") or values.get("fit") in RANKS:
        return values
    # a base that has lost a part of its weights to the LoRA cannot be the teacher of a distillation
    only = any(name in values for name in _OF_CONTRAST) or values.get("init") in checks.MOVING
    return {**values, "objective": "contrastive"} if only else values


def sound_align(settings: AlignOptions) -> AlignOptions:
    """Refuse blocks that the alignment loss does not reach."""
    if isinstance(settings.layer, int) and settings.layer > 0:
        # joint training has a task too, whose loss runs all blocks
        whole = hasattr(settings, "task")
        fault = checks.beyond_the_layer(getattr(settings, "blocks", None), settings.layer, whole=whole)
        if fault:
            raise ValueError(fault)
    checks.sound_vectors(settings)
    if settings.stop_gradient and settings.anchor == "base":
        raise ValueError("--anchor base has no gradient through the targets anyway: drop --stop-gradient")
    if settings.objective == "distil" and getattr(settings, "fit", None) not in RANKS:
        given = checks.changed(settings, _OF_CONTRAST)
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for the contrastive objective, and --objective distil has none: "
                "drop it, or use --objective both"
            )
    return settings
