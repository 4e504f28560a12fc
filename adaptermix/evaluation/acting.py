"""An adapter on a live model for as long as it is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..adapters import AdapterSource
from ..compose.attach import Attachment
from ..models import BaseModel


@contextmanager
def acting(base: BaseModel, sources: Sequence[AdapterSource]) -> Iterator[None]:
    """Let adapters act on the model until the context ends; one of another kind than a plain LoRA through PEFT.

    Raises:
        IncompatibleAdapters: an adapter does not fit the model, or several are given that are not all plain LoRAs.
    """
    if len(sources) == 1 and sources[0].beyond_linear:
        with _through_peft(base, sources[0]):
            yield
        return
    with Attachment(base.model, [source.read() for source in sources]):
        yield


@contextmanager
def _through_peft(base: BaseModel, source: AdapterSource) -> Iterator[None]:
    from peft import PeftModel

    from ..errors import IncompatibleAdapters

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
            wrapped = PeftModel.from_pretrained(base.model, str(source.path)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IncompatibleAdapters(
            f"adapter '{source.name}' must fit base model '{base.id}', and PEFT says: {reason}. "
            "Give the base model that it was trained on."
        ) from error
    try:
        yield
    finally:
        wrapped.unload()
