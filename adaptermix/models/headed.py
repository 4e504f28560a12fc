"""Base models with a task head: whether transformers has a matching class, and loading it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch

from ..errors import ModelError
from .encoders import is_encoder_half
from .head_forms import Head, Reader
from .kinds import is_causal
from .pretrained import load_model
from .quantization import LoadingOptions

if TYPE_CHECKING:
    from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def _prefix(auto: type[AutoModel], config: PreTrainedConfig) -> str | None:
    """Return the attribute under which a class of models keeps the model without a head; None if there is no class.

    Classes of encoder-decoders read the state of the decoder, and the base model is the encoder half.
    """
    if is_encoder_half(config):
        return None
    known = auto._model_mapping  # transformers has no public way to query this
    return str(known[type(config)].base_model_prefix) if type(config) in known else None


def fitting_head(
    reference: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    *,
    stack_pooling: str | None = None,
) -> Head:
    """Return the head that a base model can have: with a reader if transformers has no such head for the model.

    Args:
        reference: The base model.
        config: Its configuration; of a stack that of the model on top.
        tokenizer: Its tokenizer.
        head: The requested head.
        stack_pooling: Pooling that a stack was trained with, which its heads use by default; None for others.

    Raises:
        ModelError: the head needs a fast tokenizer.
    """
    import transformers

    form = head.form
    if form.fast and not tokenizer.is_fast:
        raise ModelError(
            f"{form.title} needs a fast tokenizer for the offsets of tokens in the text, and that of {reference!r} "
            f"({type(tokenizer).__name__}) is slow. Give another base model.",
            code="head.slow-tokenizer",
        )
    if head.reader or stack_pooling or not form.auto_class:
        reader = head.reader or Reader()
        pooling = stack_pooling if stack_pooling and reader.pooling == "auto" else reader.pooling
        return replace(head, reader=replace(reader, pooling=pooling))
    inner = _prefix(getattr(transformers, form.auto_class), config)
    # With another prefix, transformers would ignore the base model's weights without an error.
    whole = _prefix(transformers.AutoModelForCausalLM, config) if is_causal(config) else None
    fits = inner is not None and whole in (None, inner)
    return head if fits else replace(head, reader=Reader())


def load_headed(
    reference: str, head: Head, *, seed: int, dtype: torch.dtype, **options: Unpack[LoadingOptions]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a base model with a head, and return it with the names of the head's modules.

    Args:
        reference: Folder or Hub id, optionally with `@REVISION`.
        head: The head.
        seed: Seed of the weights of a head that the checkpoint does not have.
        dtype: Dtype of the weights.
        options: Further arguments of `from_pretrained` for a quantised model.

    Raises:
        ModelError: the checkpoint lacks weights of the base model itself.
    """
    labels = head.labels if head.form.outputs is None else [f"LABEL_{number}" for number in range(head.outputs)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a new head is initialised at random
        model, info = load_model(
            reference,
            head.form.auto_class,
            output_loading_info=True,
            num_labels=head.outputs,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            dtype=dtype,
            **options,
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
