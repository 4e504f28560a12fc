"""The kinds of adapter modules: plain LoRA, and those whose delta depends on the base weight. A kind is a file here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from ...errors import PlanError
from ...io.checkpoint_files import Checkpoint
from ..base_weights import base_weight
from ..module import AdapterModule
from ..source import AdapterSource
from ..state import AdapterMeta
from .dora import Dora
from .lora import AdapterKind
from .olora import Olora
from .pissa import Pissa

__all__ = ["KINDS", "AdapterKind", "kinds_of", "load_module", "weight_for"]

KINDS: tuple[AdapterKind, ...] = (Pissa(), Olora(), Dora())
"""In the order in which they act on what the file holds: the last kind of an adapter gives its delta."""


def kinds_of(meta: AdapterMeta) -> tuple[AdapterKind, ...]:
    """Return the kinds that an adapter is of; none for a plain LoRA."""
    return tuple(kind for kind in KINDS if kind.is_of(meta))


def weight_for(
    kind: AdapterKind,
    sources: Sequence[AdapterSource],
    path: str,
    shape: tuple[int, int],
    checkpoint: Checkpoint | None,
) -> Float[Tensor, "out in"]:
    """Read the base weight of a module for adapters of one kind.

    Args:
        kind: The kind.
        sources: The adapters of this kind.
        path: Path of the module.
        shape: Shape [out in] of its update.
        checkpoint: The base model, or None.

    Raises:
        ModelError: as `base_weight`.
        PlanError: there is no base model.
    """
    if checkpoint is None:
        raise PlanError(kind.missing_base([f"'{source.name}'" for source in sources]), code="merge.needs-base")
    return base_weight(checkpoint, path, shape, fan_in_fan_out=sources[0].meta.fan_in_fan_out)


def load_module(source: AdapterSource, path: str, checkpoint: Checkpoint | None) -> AdapterModule:
    """Read a module with factors that are an update of the base weight.

    Args:
        source: The adapter.
        path: Path of the module.
        checkpoint: The base model, which PiSSA and OLoRA need.

    Raises:
        AdapterFormatError: a part of the module holds NaN or infinity.
        ModelError: the base model does not fit.
        PlanError: the base model is missing.
    """
    module = source.module(path)
    for kind in kinds_of(source.meta):
        shape = module.update.shape
        module = kind.module(module, partial(weight_for, kind, [source], path, shape, checkpoint))
    return module
