"""Merge the parts of adapters that are not updates: fully trained (whole) tensors, biases and trained tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters import AdapterMeta, StoredTensor
from ..adapters.keys import PREFIX, TOKENS, in_modules
from ..errors import IncompatibleAdapters, PlanError, UsageError, did_you_mean

REFUSE, AVERAGE = "refuse", "average"
_BIASES = ("none", "lora_only", "all")
_OPTIONS = (
    "Choose 'average' (by the size of the weights), or the name or number of the adapter to take them from (--saved)."
)


class Saved(Protocol):
    """The part of `AdapterSource` that concerns whole tensors."""

    @property
    def name(self) -> str:
        """Short name for messages."""

    @property
    def meta(self) -> AdapterMeta:
        """Metadata of the adapter."""

    @property
    def saved_headers(self) -> Mapping[str, StoredTensor]:
        """Dtype and shape of each tensor by its name in the file."""

    def load_saved(self, key: str) -> Tensor:
        """Read one of these tensors."""


def resolve_policy(names: Sequence[str], policy: str | int) -> str | int:
    """Return "refuse", "average", or the index (from 0) of the adapter whose tensors are used.

    Args:
        names: Names of the adapters.
        policy: One of the two words, or an adapter's name or number (from 1).

    Raises:
        PlanError: the policy is unknown, or several adapters have that name.
    """
    if policy in (REFUSE, AVERAGE):
        return policy
    matches = [index for index, name in enumerate(names) if name == policy]
    if len(matches) == 1:
        return matches[0]
    text = str(policy)
    if text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= len(names):
        return int(text) - 1
    problem = "several adapters have this name, so pass a number" if matches else "unknown value"
    raise UsageError(
        f"--saved must be 'refuse', 'average', or the adapter to take fully trained tensors from ({', '.join(names)}, "
        f"or 1 to {len(names)}), got {policy!r}: {problem}.{did_you_mean(text, [REFUSE, AVERAGE, *names])}",
        code="saved.policy",
    )


def _owners_by_name(sources: Sequence[Saved], modules: Collection[str]) -> dict[str, dict[int, str]]:
    """Return, per name in the merged file, the indices of the adapters with that tensor and the name that each uses.

    PEFT moves the parameters of a module that it adapts to `MODULE.base_layer`. A bias or an embedding that one adapter
    stores for a plain module moves there too if another adapter adapts that module.
    """
    trained = tuple(dict.fromkeys(name for source in sources for name in source.meta.saved_modules))
    both = next((module for module in sorted(modules) if in_modules(f"{module}.weight", trained)), None)
    if both is not None:
        raise IncompatibleAdapters(
            f"module '{both}' must be either adapted or fully trained (modules_to_save {', '.join(trained)}), and is "
            f"both in {_listed([source.name for source in sources])}. Leave one of the adapters out.",
            code="saved.also-adapted",
        )
    owners: dict[str, dict[int, str]] = {}
    for index, source in enumerate(sources):
        for key in source.saved_headers:
            module, _, last = key.removeprefix(PREFIX).rpartition(".")
            if key.endswith(f".{TOKENS}") and len(sources) > 1:
                _check_tokens_alone(source.name, module.rpartition(".")[0], modules, trained)
            name = f"{PREFIX}{module}.base_layer.{last}" if module in modules else key
            owners.setdefault(name, {})[index] = key
    return owners


def _check_tokens_alone(name: str, module: str, modules: Collection[str], trained: tuple[str, ...]) -> None:
    if module in modules or in_modules(f"{module}.weight", trained):
        raise IncompatibleAdapters(
            f"adapter '{name}' trains tokens of '{module}', so no adapter may adapt or fully train this module, but "
            "one does. Leave one of them out.",
            code="saved.tokens-adapted",
        )


def merge_saved(
    sources: Sequence[Saved],
    weights: Sequence[float],
    policy: str | int = REFUSE,
    *,
    modules: Collection[str] = (),
) -> dict[str, Tensor]:
    r"""Merge the fully trained tensors of the adapters, by name.

    A tensor that only one adapter has is copied, regardless of policy and weight: it replaces a tensor of the base, so
    it cannot be scaled. Equal tensors (PEFT stores copies of adapted embeddings) are copied once. For the others:

    * "refuse": an error that names the choices;
    * "average": $\sum_i |w_i| t_i / \sum_i |w_i|$ over the adapters that have it;
    * an adapter's name or number: its tensor, where it has one.

    Args:
        sources: The adapters.
        weights: Weight per adapter.
        policy: See above.
        modules: Every module that the merged adapter adapts.

    Raises:
        AdapterFormatError: a tensor holds NaN or infinity.
        IncompatibleAdapters: tensors differ and the policy does not decide; shapes differ in an average; a module is
            adapted by one adapter and fully trained by another.
        PlanError: an unknown policy, or an average of weights that are all zero.
    """
    names = [source.name for source in sources]
    chosen = resolve_policy(names, policy)
    merged = {}
    for key, keys in sorted(_owners_by_name(sources, modules).items()):
        owners = [chosen] if isinstance(chosen, int) and chosen in keys else list(keys)
        tensors = [sources[index].load_saved(keys[index]) for index in owners]
        titles = [names[index] for index in owners]
        if all(_equal(tensors[0], other) for other in tensors[1:]):
            merged[key] = tensors[0]
        elif chosen == AVERAGE:
            merged[key] = _average(key, titles, tensors, [weights[index] for index in owners])
        else:
            raise IncompatibleAdapters(
                f"the fully trained tensor '{key}' must be the same in all adapters or in one of them only, and "
                f"differs between {_listed(titles)}. {_OPTIONS}",
                code="saved.differ",
            )
    return merged


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal values, compared in the wider of their dtypes."""
    if one.shape != other.shape:
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _average(key: str, names: Sequence[str], tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        listed = ", ".join(f"'{name}' {list(tensor.shape)}" for name, tensor in zip(names, tensors, strict=True))
        raise IncompatibleAdapters(
            f"the fully trained tensor '{key}' must have one shape to be averaged, found {listed}. "
            "Take it from one adapter by its name or number (--saved).",
            code="saved.shapes",
        )
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise IncompatibleAdapters(
            f"the tensor '{key}' must be of a float dtype to be averaged, and is not in {_listed(names)}. "
            "Take it from one adapter by its name or number (--saved).",
            code="saved.dtype",
        )
    total = sum(abs(weight) for weight in weights)
    if total == 0:
        raise PlanError(
            f"the fully trained tensor '{key}' cannot be averaged, since the weights of {_listed(names)} are zero. "
            "Take it from one adapter by its name or number (--saved).",
            code="saved.zero-weights",
        )
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    result = torch.zeros_like(tensors[0], dtype=torch.promote_types(dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        result.add_(tensor.to(result.dtype), alpha=abs(weight) / total)
    return result.to(dtype)


def merge_biases(
    biases: Sequence[Float[Tensor, " out"] | None], weights: Sequence[float]
) -> Float[Tensor, " out"] | None:
    r"""Return the weighted sum $\sum_i w_i b_i$ of the biases inside the LoRAs of one module.

    Args:
        biases: One per adapter, already multiplied by the LoRA's scale; None counts as zero.
        weights: Weight per adapter.

    Returns:
        The sum in float32 or wider; None if no adapter has a bias.

    Shapes: biases and sum are [out].
    """
    present = [(bias, weight) for bias, weight in zip(biases, weights, strict=True) if bias is not None]
    if not present:
        return None
    dtype = torch.float32
    for bias, _ in present:
        dtype = torch.promote_types(dtype, bias.dtype)
    return torch.stack([weight * bias.to(dtype) for bias, weight in present]).sum(dim=0)


def merge_tokens(names: Sequence[str], metas: Sequence[AdapterMeta]) -> dict[str, tuple[int, ...]]:
    """Return the trained token ids of the merged adapter, per embedding.

    PEFT stores the new embedding rows and not their difference from the old ones, so the rows of different tokens
    cannot be merged: adapters that train tokens must train the same ones.

    Args:
        names: Names of the adapters.
        metas: Metadata of the adapters.

    Raises:
        IncompatibleAdapters: two adapters train different tokens of an embedding, or use different names for it.
    """
    trained = [(name, dict(meta.trainable_tokens)) for name, meta in zip(names, metas, strict=True)]
    trained = [(name, tokens) for name, tokens in trained if tokens]
    for name, tokens in trained[1:]:
        if tokens != trained[0][1]:
            raise IncompatibleAdapters(
                f"adapters '{trained[0][0]}' and '{name}' must train the same tokens (trainable_token_indices) in the "
                f"same order, and do not. Leave one of them out.",
                code="saved.tokens-differ",
            )
    return trained[0][1] if trained else {}


class WholeTensorFields(TypedDict):
    """The fields of `AdapterMeta` about tensors that are not updates."""

    saved_modules: tuple[str, ...]
    bias: str
    trainable_tokens: Mapping[str, tuple[int, ...]]


def merge_extras(names: Sequence[str], metas: Sequence[AdapterMeta]) -> WholeTensorFields:
    """Return the fields of the merged `AdapterMeta` about tensors that are not updates.

    Args:
        names: Names of the adapters.
        metas: Metadata of the adapters.

    Returns:
        `saved_modules` (all of them), `bias` (the widest) and `trainable_tokens`.

    Raises:
        IncompatibleAdapters: as `merge_tokens`.
    """
    return {
        "saved_modules": tuple(dict.fromkeys(module for meta in metas for module in meta.saved_modules)),
        "bias": max((meta.bias for meta in metas), key=_BIASES.index),
        "trainable_tokens": merge_tokens(names, metas),
    }


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
