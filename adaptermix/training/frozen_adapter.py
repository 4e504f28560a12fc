"""The frozen adapter below the one in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from ..adapters import AdapterSource, open_adapter
from ..adapters.paths import fitted
from ..merging.attach import Attachment
from ..merging.on_model import refuse_own_adapter
from ..options import TrainingSettings


def attach_on(model: nn.Module, settings: TrainingSettings, *, headed: bool) -> AdapterSource | None:
    """Attach the frozen adapter that is to be trained on top of, for the life of the model; return it if there is one.

    Args:
        model: The base model.
        settings: The run's settings.
        headed: Whether the model has a head; one does not act on the states of a model without.

    Raises:
        AdapterMixError: it is damaged, of another base model, no plain LoRA, or that of a stack.
    """
    if settings.on_top_of is None:
        return None
    source = open_adapter(Path(settings.on_top_of))
    refuse_own_adapter(settings.base, [source])
    state = fitted(source, [name for name, _ in model.named_modules()]).read()
    Attachment(model, [state if headed else replace(state, saved={})])
    return source
