"""The two kinds of model that `spectrum` compares: the matrices of a checkpoint, and the updates of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import AdapterMeta, AdapterSource, open_adapter
from ..algebra import LowRank
from ..algebra.subspaces import Frame, frame
from ..checkpoints.reading import check_whole
from ..errors import AdapterFormatError, ModelError, code_of
from ..io.checkpoint_files import Checkpoint, open_checkpoint, resolve_checkpoint

_FLOATS = {"F64", "F32", "F16", "BF16"}
_ADAPTER = "adapter_config.json"
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The two-dimensional float weights of a checkpoint, read one at a time.

    Args:
        reference: The model's folder or Hub id.
        checkpoint: Its files.
        matrices: Shape per module path.
    """

    reference: str
    checkpoint: Checkpoint
    matrices: Mapping[str, Shape]

    def load(self, path: str) -> Tensor:
        """Read one weight, at least in float32.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        key = path if path in self.checkpoint.tensors else f"{path}.weight"
        tensor = self.checkpoint.load(key)
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{self.checkpoint.path}: every weight must be finite, and {key} holds NaN or infinity. "
                "Fetch or save it again.",
                code="base.not-finite",
            )
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """The updates of an adapter, read one at a time.

    Args:
        reference: The adapter's folder.
        source: Its files.
        matrices: Shape per module path.
    """

    reference: str
    source: AdapterSource
    matrices: Mapping[str, Shape]

    def load(self, path: str) -> LowRank:
        """Read one update, in float64."""
        return self.source.load(path).to(torch.float64)

    def frame(self, path: str, update: LowRank) -> Frame:
        """Return the frame of an update of that module.

        Raises:
            AdapterFormatError: the update overflows.
        """
        try:
            return frame(update)
        except ValueError as error:
            raise AdapterFormatError(
                f"{self.reference}: module '{path}': {error}. Check its lora_alpha.",
                code=code_of(error, "inspect.overflow"),
            ) from error


def beyond_factors(meta: AdapterMeta) -> tuple[str, ...]:
    """Return notes about an adapter's content besides the factors, which are the only part compared here."""
    content = {
        "its DoRA magnitudes": meta.dora,
        "its fully trained modules": bool(meta.saved_modules),
        "its trained biases": meta.bias != "none",
        "its trained tokens": bool(meta.trainable_tokens),
    }
    notes = [f"{what} are not part of these numbers" for what, there in content.items() if there]
    if meta.initial is not None:
        notes.append(
            f"its training started from a part of the base weights ({meta.initial}), so the numbers describe its "
            "factors, not its delta"
        )
    return tuple(notes)


def open_side(reference: str) -> Weights | Updates:
    """Open a model folder, an adapter folder, or a Hub id with @REVISION; reads headers only.

    Raises:
        ModelError: there is no such model, or it is damaged.
        AdapterFormatError: the adapter is damaged, or has unsupported content.
    """
    folder = resolve_checkpoint(reference)
    if (folder / _ADAPTER).is_file():
        source = open_adapter(folder)
        shapes = {path: (header.out, header.into) for path, header in source.modules.items()}
        return Updates(reference=reference, source=source, matrices=shapes)
    checkpoint = check_whole(open_checkpoint(folder))
    matrices = {
        key.removesuffix(".weight"): (header.shape[0], header.shape[1])
        for key, header in checkpoint.tensors.items()
        if len(header.shape) == 2 and min(header.shape) > 0 and header.dtype in _FLOATS
    }
    return Weights(reference=reference, checkpoint=checkpoint, matrices=matrices)
