"""States of another encoder, such as a translation model, as sources (FLARE-MT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, PlanError
from ..models.base import fingerprint_of, pick_device, pick_dtype
from ..models.positions import positions_of
from ..models.pretrained import load_config, load_model, load_tokenizer
from ..tasks.data.languages import canonical_language
from ..tasks.heads.base import LONGEST, Features, pad_to

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
        self._tokenizer = load_tokenizer(reference, what=_WHAT)
        model = load_model(reference, "AutoModel", what=_WHAT, dtype=pick_dtype(dtype, target))
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        self._model: Any = encoder.to(target).eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.width: int = getattr(config, "d_model", None) or config.hidden_size
        self.fingerprint = fingerprint_of(reference)
        self._longest = min(self._tokenizer.model_max_length, positions_of(encoder) or LONGEST, LONGEST)
        self._tags = self._tags_of(reference, tag)

    def _tags_of(self, reference: str, tag: str | None) -> dict[str, str]:
        """Return the tokenizer's language tags, by language; "" stands for all."""
        if not hasattr(self._tokenizer, "src_lang"):
            if tag:
                raise PlanError(
                    f"--source-tag is for encoders that read a language tag, and {reference!r} reads none.",
                    code="fusion.no-source-tag",
                )
            return {}
        known = [token.strip("_") for token in self._tokenizer.all_special_tokens]
        if tag:
            if tag not in known:
                raise PlanError(
                    f"--source-tag must be a language tag of {reference!r}, got {tag!r}.", code="fusion.source-tag"
                )
            return {"": tag}
        tags: dict[str, str] = {}
        for token in sorted(known, key=_is_rare):
            if language := canonical_language(token):
                tags.setdefault(language, token)
        return tags

    def encode(self, texts: Sequence[tuple[str, ...]], languages: Sequence[str]) -> list[Features]:
        """Return the encoder's inputs for texts, or for pairs of texts.

        Raises:
            ModelError: the encoder reads a tag, and has no tag for a language.
        """
        features: list[Features] = []
        for text, language in zip(texts, languages, strict=True):
            if self._tags:
                tag = self._tags.get("", self._tags.get(language))
                if tag is None:
                    raise ModelError(
                        f"the source encoder must support the language of every text, and has no tag for {language!r}: "
                        "give a related language with --source-tag.",
                        code="fusion.language",
                    )
                self._tokenizer.src_lang = tag
            features.append(self._tokenizer(*text, truncation=True, max_length=self._longest))
        return features

    @torch.no_grad()
    def read(self, texts: Sequence[Features], length: int | None = None) -> Tensor:
        """Return the states of texts, padded on the right to a length, by default the longest one's.

        Shapes: [rows tokens width].
        """
        batch = pad_to(self._tokenizer, texts, length).to(self._model.device)
        states: Tensor = self._model(**batch).last_hidden_state
        return states


def _is_rare(tag: str) -> bool:
    """Return whether a tag names a script that its language is rarely written in (`ace_Arab`)."""
    import langcodes

    language, _, script = tag.partition("_")
    return bool(script) and langcodes.Language.get(language).maximize().script != script
