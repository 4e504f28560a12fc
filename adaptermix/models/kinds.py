"""Kinds of base models, by their configurations, and the classes that load them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..errors import ModelError
from .encoders import check_encoder_half, encoder_class, is_encoder_half

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["causal", "encoder"]
"""Language models, and encoders: models in which each token reads all others."""


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether a configuration is that of a language model, judged by the name of its class."""
    named = " ".join(config.architectures or ())
    return "ForCausalLM" in named or "LMHead" in named


def kind_of(config: PretrainedConfig, reference: str) -> Kind:
    """Return the kind of a model; encoder-decoders count as encoders, since only their encoder is loaded.

    Raises:
        ModelError: the model is neither a language model nor an encoder of text.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if is_encoder_half(config):
        check_encoder_half(config, reference)
        return "encoder"
    if is_causal(config):
        return "causal"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise ModelError(
        f"{reference}: a language model or an encoder is needed, found model type {config.model_type!r}.",
        code="model.type",
    )


def loader_of(kind: Kind, config: PretrainedConfig) -> str | type:
    """Return the class that loads a kind of model without a head for a task, or its name in transformers."""
    return "AutoModelForCausalLM" if kind == "causal" else encoder_class(config)
