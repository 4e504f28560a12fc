"""The weights of a base model that adapters belong to: found by the path of a module, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError, PlanError
from ..io.checkpoint_files import Checkpoint, loaded_names
from .keys import PREFIX, is_embedding
from .kinds import AdapterKind, kinds_of
from .module import AdapterModule
from .paths import same_text
from .source import AdapterSource


def find_weight(checkpoint: Checkpoint, module: str) -> str:
    """Return the name of a module's weight in a checkpoint.

    Args:
        checkpoint: The base model.
        module: Path of the module. The path or the name may have a prefix that the other lacks, as encoders are saved
            with and without one (`bert.`), as long as no numbered block is lost and only one weight fits. Names that
            transformers changes on loading, as of vision-language models, may be those of the file or of the model.

    Raises:
        ModelError: no weight fits, or several do.
    """
    if f"{module}.weight" in checkpoint.tensors:
        return f"{module}.weight"
    pieces = module.split(".")
    matches: list[str] = []
    for start in range(len(pieces)):
        if start and pieces[start - 1].isdigit():
            break
        tail = ".".join(pieces[start:]) + ".weight"
        matches = [key for key in checkpoint.tensors if key == tail or (not start and key.endswith(f".{tail}"))]
        if matches:
            break
    matches = matches or _renamed_on_loading(checkpoint, module)
    # A vision-language model's files may keep the names of another release than the class that is loaded.
    matches = matches or [key for key in checkpoint.tensors if same_text(key, f"{module}.weight")]
    if len(matches) == 1:
        return matches[0]
    what = f"{len(matches)} weights end like it ({', '.join(matches[:3])})" if matches else "no weight ends like it"
    raise ModelError(
        f"the base model {checkpoint.path} must hold one weight for module '{module}', but {what}. "
        "Give the base model that the adapter was trained on, in whole precision and with its parts unfused.",
        code="base.no-weight",
    )


def _renamed_on_loading(checkpoint: Checkpoint, module: str) -> list[str]:
    """Return the name in the files of a weight that has another one in the model that transformers makes of them."""
    rename, names = loaded_names(checkpoint.path, tuple(checkpoint.tensors))
    expected = f"{module}.weight"
    return [names[name] for name in (expected, rename(expected)) if name in names][:1]


def base_weight(
    checkpoint: Checkpoint, module: str, shape: tuple[int, int], *, fan_in_fan_out: bool = False
) -> Float[Tensor, "out in"]:
    """Read the weight of one linear module, in the dtype of the file.

    Args:
        checkpoint: The base model.
        module: Path of the module.
        shape: Shape [out in] of the module's update; 0 for a side that the adapter's file does not show.
        fan_in_fan_out: Whether the base keeps its weights as [in out]; the result is [out in] all the same.

    Raises:
        ModelError: there is no such weight, it has another shape, is not of a float dtype, or is not finite.
    """
    key = find_weight(checkpoint, module)
    weight = checkpoint.load(key)
    weight = weight.T if fan_in_fan_out and weight.ndim == 2 else weight
    if not weight.is_floating_point() or weight.itemsize < 2 or not _fits(tuple(weight.shape), shape):
        raise ModelError(
            f"{checkpoint.path}: {key} must be a float matrix {list(shape)} like the update of '{module}', "
            f"found {weight.dtype} {list(weight.shape)}. Give the base model that the adapter was trained on.",
            code="base.weight-shape",
        )
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"{checkpoint.path}: {key} must be finite, and holds NaN or infinity. Fetch the model again.",
            code="base.not-finite",
        )
    return weight


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
        header = source.modules[path]
        shape = header.out, header.into
        module = kind.module(module, partial(weight_for, kind, [source], path, shape, checkpoint))
    return module


def without_copies(source: AdapterSource, checkpoint: Checkpoint) -> AdapterSource:
    """Return an adapter without the whole tensors that are the base model's own.

    PEFT stores unchanged copies of the tables of embeddings and output heads that it adapts.

    Args:
        source: The adapter.
        checkpoint: The base model.

    Raises:
        AdapterFormatError: a tensor holds NaN or infinity.
    """

    def is_copy(key: str) -> bool:
        module = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        if not key.endswith(".weight") or not is_embedding(module):
            return False
        try:
            name = find_weight(checkpoint, module)
        except ModelError:
            return False
        return _is_equal(source.load_saved(key), checkpoint.load(name))

    kept = {key: header for key, header in source.saved_headers.items() if not is_copy(key)}
    return replace(source, saved_headers=kept)


def _fits(shape: tuple[int, ...], expected: tuple[int, int]) -> bool:
    return len(shape) == 2 and all(side in (0, size) for size, side in zip(shape, expected, strict=True))


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether one of two tensors is the other, or the other rounded to its dtype."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)
