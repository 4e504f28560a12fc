"""States of another encoder, such as a translation model, as sources (FLARE-MT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError, PlanError
from ..models.base import fingerprint_of
from ..models.devices import pick_device, pick_dtype
from ..models.encoders import encoder_class, width_of
from ..models.languages import Tagged, known_tags, language_tags
from ..models.positions import positions_of
from ..models.pretrained import load_config, load_model, load_tokenizer
from ..tasks.heads.base import LONGEST, Features, pad_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WHAT = "source encoder"


def check_encoder(reference: str) -> None:
    """Check that a model has an encoder, from its configuration only.

    Raises:
        ModelError: it has no encoder.
    """
    load_config(reference, what=_WHAT)


class Latents:
    """An encoder whose last states of a text are the source.

    Args:
        reference: Folder or Hub id, optionally with `@REVISION`, of an encoder; of an encoder-decoder (NLLB, M2M100,
            mT5), whose decoder is left out; or of a decoder, whose last states are used.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        tag: Language tag of all texts, for encoders that read one; default the tag of each text's language.

    Attributes:
        width: Width of the states.
        fingerprint: Hash of its weight files; None if they are not on disk.

    Raises:
        ModelError: there is no such model.
        PlanError: the encoder does not have the tag, or reads no tags.

    Reference: FLARE, section 3.1 (FLARE MT).
    """

    def __init__(self, reference: str, *, device: str = "auto", dtype: str = "auto", tag: str | None = None) -> None:
        target = pick_device(device)
        tokenizer = load_tokenizer(reference, what=_WHAT)
        loader = encoder_class(load_config(reference, what=_WHAT))
        model = load_model(reference, loader, what=_WHAT, dtype=pick_dtype(dtype, target))
        self._model: PreTrainedModel = model.to(target).eval().requires_grad_(False)
        self.width = width_of(model.config)
        self.fingerprint = fingerprint_of(reference)
        self._longest = min(tokenizer.model_max_length, positions_of(model) or LONGEST, LONGEST)
        self._tagged = _tagged(tokenizer, reference, tag)

    def encode(self, texts: Sequence[tuple[str, ...]], languages: Sequence[str]) -> Sequence[Features]:
        """Return the encoder's inputs for texts, or for pairs of texts.

        Raises:
            ModelError: the encoder reads a tag, and has no tag for a language.
        """
        if (language := self._tagged.without_tag(languages)) is not None:
            raise ModelError(
                f"the source encoder must support the language of every text, and has no tag for {language!r}: "
                "give a related language with --source-tag.",
                code="fusion.language",
            )
        return self._tagged.encode(texts, languages, truncation=True, max_length=self._longest)

    @torch.no_grad()
    def read(self, texts: Sequence[Features], length: int | None = None) -> Tensor:
        """Return the states of texts, padded on the right to a length, by default the longest one's.

        Shapes: [rows tokens width].
        """
        batch = pad_to(self._tagged.tokenizer, texts, length).to(self._model.device)
        states: Tensor = self._model(**batch).last_hidden_state
        return states


def _tagged(tokenizer: PreTrainedTokenizerBase, reference: str, tag: str | None) -> Tagged:
    """Return the tokenizer with its language tags, or with one tag for all texts."""
    tags = language_tags(tokenizer)
    if not tag:
        return Tagged(tokenizer=tokenizer, tags=tags)
    if not tags:
        raise PlanError(
            f"--source-tag is for encoders that read a language tag, and {reference!r} reads none.",
            code="fusion.no-source-tag",
        )
    if tag not in known_tags(tokenizer):
        raise PlanError(f"--source-tag must be a language tag of {reference!r}, got {tag!r}.", code="fusion.source-tag")
    return Tagged(tokenizer=tokenizer, tags={"": tag})
