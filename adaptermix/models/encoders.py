"""Encoder halves of encoder-decoders (mBART, M2M100, NLLB, T5, mT5), as separate models."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


_MARK = "is_encoder_half"
"""Class attribute of encoder halves."""


def has_decoder(model: nn.Module) -> bool:
    """Return whether a model, with any head, is an encoder-decoder whose decoder is there."""
    whole: bool = getattr(model.config, "is_encoder_decoder", False)
    return whole and not any(hasattr(module, _MARK) for module in model.modules())


def is_encoder_half(config: PretrainedConfig) -> bool:
    """Return whether a model is an encoder-decoder, or a checkpoint that holds only the encoder of one."""
    return config.is_encoder_decoder or any(name.endswith("EncoderModel") for name in config.architectures or ())


def check_encoder_half(config: PretrainedConfig, reference: str) -> None:
    """Refuse an encoder-decoder whose encoder does not read text.

    Raises:
        ModelError: the encoder reads sound or images.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )

    texts = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.keys()
    if config.model_type not in texts:
        raise ModelError(
            f"{reference}: an encoder-decoder must have an encoder of text, found model type {config.model_type!r}.",
            code="model.encoder-decoder",
        )


def encoder_class(config: PretrainedConfig) -> str | type[PreTrainedModel]:
    """Return the class that loads an encoder without a head: `AutoModel`, or for encoder-decoders their encoder half.

    Args:
        config: The model's configuration.
    """
    import transformers

    if not is_encoder_half(config):
        return "AutoModel"
    return _half(transformers.AutoModel._model_mapping[type(config)])  # transformers has no public way to query this


def width_of(config: PretrainedConfig) -> int:
    """Return the width of the states of a model with this configuration."""
    config = config.get_text_config()
    return int(getattr(config, "d_model", None) or config.hidden_size)


def embedding_width_of(config: PretrainedConfig) -> int:
    """Return the width of a model's word embeddings, which some models (ELECTRA, ALBERT, OPT) widen to their states."""
    config = config.get_text_config()
    names = ("embedding_size", "word_embed_proj_dim")
    return next((int(size) for name in names if (size := getattr(config, name, None))), width_of(config))


@cache
def _half(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the encoder half of a class without a head. Modules keep their paths, such as `encoder.layers.0.fc1`."""

    def init(self: PreTrainedModel, config: PretrainedConfig) -> None:
        whole.__init__(self, config)
        del self.decoder
        # Training would skip blocks at random, and losses read the states after a block.
        if hasattr(self.encoder, "layerdrop"):
            self.encoder.layerdrop = 0.0
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(self, name) or {}
            setattr(self, name, {key: other for key, other in tied.items() if not key.startswith("decoder.")})

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> object:
        texts = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return self.encoder(attention_mask=attention_mask, **texts, **kwargs)

    def embeddings(self: PreTrainedModel) -> object:
        return self.encoder.get_input_embeddings()

    def set_embeddings(self: PreTrainedModel, new: nn.Module) -> None:
        self.encoder.set_input_embeddings(new)

    return type(
        f"{whole.__name__.removesuffix('Model')}EncoderHalf",
        (whole,),
        {
            "__init__": init,
            "__module__": __name__,
            "forward": forward,
            "get_input_embeddings": embeddings,
            "set_input_embeddings": set_embeddings,
            _MARK: True,
            "_keys_to_ignore_on_load_unexpected": [r"decoder", r"lm_head", r"final_logits_bias"],
        },
    )
