"""Base models with a task head: whether transformers has a matching class, and loading it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .head_forms import Head
from .pretrained import load_model


def _prefix(auto: Any, config: Any) -> str | None:
    """Return the attribute under which a class of models keeps the model without a head; None if there is no class."""
    known = auto._model_mapping  # transformers has no public way to query this
    return str(known[type(config)].base_model_prefix) if type(config) in known else None


def check_head(reference: str, config: Any, tokenizer: Any, head: Head) -> None:
    """Refuse a base model that cannot have the head, before it is loaded.

    Raises:
        ModelError: transformers has no such class, its class would ignore the base model's weights, or the tokenizer is
            slow.
    """
    import transformers

    form = head.form
    if form.fast and not tokenizer.is_fast:
        raise ModelError(
            f"{form.title} needs a fast tokenizer for the offsets of tokens in the text, and that of {reference!r} "
            f"({type(tokenizer).__name__}) is slow. Give another base model.",
            code="head.slow-tokenizer",
        )
    inner = _prefix(getattr(transformers, form.auto_class), config)
    if inner is None:
        raise ModelError(
            f"transformers has no {form.auto_class} for models of type {config.model_type!r}, and {reference!r} is "
            f"one. Use --head none, or another base model.",
            code="head.no-class",
        )
    # With another prefix, transformers would ignore the base model's weights without an error.
    prefixes = {name for name in (_prefix(transformers.AutoModelForCausalLM, config),) if name and _is_causal(config)}
    if prefixes - {inner}:
        raise ModelError(
            f"{form.auto_class} of transformers does not load the weights of {reference!r}: it looks for them under "
            f"'{inner}', and language models of type {config.model_type!r} have them under '{prefixes.pop()}'. Use "
            "--head none, or an encoder.",
            code="head.class-prefix",
        )


def _is_causal(config: Any) -> bool:
    named = " ".join(config.architectures or ())
    return "ForCausalLM" in named or "LMHead" in named


def load_headed(reference: str, head: Head, *, seed: int, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """Load a base model with a head, and return it with the names of the head's modules.

    Args:
        reference: Folder or Hub id, optionally with `@REVISION`.
        head: The head.
        seed: Seed of the weights of a head that the checkpoint does not have.
        options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: the checkpoint lacks weights of the base model itself.
    """
    labels = head.labels if head.form.outputs is None else [f"LABEL_{number}" for number in range(head.outputs)]
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: n for n, label in enumerate(labels)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a new head is initialised at random
        model, info = load_model(
            reference, head.form.auto_class, output_loading_info=True, num_labels=head.outputs, **names, **options
        )
    inner = f"{model.base_model_prefix}."
    new = {key.removeprefix(inner).split(".")[0] for key in info["missing_keys"]}
    strange = sorted(new & {part for part, _ in model.base_model.named_children()} - {"pooler"})
    if strange:
        raise ModelError(
            f"the checkpoint {reference!r} must hold the weights of its base model, and {', '.join(strange)} would be "
            f"random under {head.form.auto_class}. Give a checkpoint of this architecture.",
            code="head.random-weights",
        )
    return model, tuple(sorted(new | {module for module in head.form.modules if hasattr(model, module)}))
